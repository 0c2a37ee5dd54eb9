/*
 * wire.c
 *		What goes over the wire to central: batches as CloudEvents bodies, and
 *		the headers that identify a batch and an attempt.
 *
 * Called by the sync worker while it prepares a batch.  Pure functions over
 * memory; none sends anything or touches a table.  Inside a transaction: the
 * key needs a resource owner, and a server whose encoding is not UTF8 looks
 * its conversion up in the catalog.
 *
 * An event that cannot be said in UTF-8 JSON is refused with an error text and
 * leaves the body as it was, so that the caller can set it aside and go on:
 * one odd text must never stop a lane.
 */
#include "postgres.h"

#include <zlib.h>

#include "catalog/namespace.h"
#include "common/cryptohash.h"
#include "common/sha2.h"
#include "common/string.h"
#include "mb/pg_wchar.h"
#include "port/pg_bswap.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"
#include "wire.h"

/* Longest attribute, such as an entity's id, in bytes of the server's encoding. */
#define MAX_ATTRIBUTE (1024 * 1024)

/* deflateInit2(): the largest window, and a gzip header around the stream. */
#define GZIP_WINDOW_BITS (15 + 16)
#define GZIP_MEMORY_LEVEL 8
#define GZIP_CHUNK 8192

#define APPEND_LITERAL(buf, literal) \
	appendBinaryStringInfo(buf, literal, sizeof(literal) - 1)

typedef enum ToUtf8
{
	TO_UTF8_NOTHING,			/* server encoding is UTF8: text is valid already */
	TO_UTF8_VERIFY,				/* SQL_ASCII: nobody knows, so look */
	TO_UTF8_CONVERT
} ToUtf8;

typedef struct SmBodyState
{
	MemoryContext context;		/* everything of this body */
	MemoryContext scratch;		/* converted texts of one event */
	bool		compress;
	z_stream	zlib;
	StringInfoData plain;		/* compressing: what zlib has not been given yet */
	StringInfoData text;		/* an attribute put together */
	ToUtf8		to_utf8;
	Oid			conversion;		/* for TO_UTF8_CONVERT */
	char	   *branch_id;		/* of the latest event, ... */
	char	   *source;			/* ... and the URI made of it */
} SmBodyState;

/* ---------------------------------------------------------------------------
 * Compression
 * ------------------------------------------------------------------------ */

/* zlib reports a lack of memory by itself; an ERROR must not jump through it. */
static voidpf
allocate_for_zlib(voidpf context, uInt items, uInt size)
{
	return MemoryContextAllocExtended((MemoryContext) context, (Size) items * size,
									  MCXT_ALLOC_NO_OOM);
}

static void
free_for_zlib(voidpf context, voidpf memory)
{
	pfree(memory);
}

/* Give zlib what has been gathered. */
static void
compress_plain(SmBody *body, int flush)
{
	SmBodyState *state = body->state;
	z_stream   *z = &state->zlib;
	StringInfo	out = &body->out;
	int			rc;

	z->next_in = (Bytef *) state->plain.data;
	z->avail_in = state->plain.len;
	do
	{
		enlargeStringInfo(out, GZIP_CHUNK);
		z->next_out = (Bytef *) out->data + out->len;
		z->avail_out = GZIP_CHUNK;
		rc = deflate(z, flush);
		if (rc == Z_STREAM_ERROR)
			elog(ERROR, "zlib lost its state");
		out->len += GZIP_CHUNK - z->avail_out;
	} while (z->avail_out == 0);
	Assert(z->avail_in == 0);
	Assert(flush != Z_FINISH || rc == Z_STREAM_END);
	out->data[out->len] = '\0';
	resetStringInfo(&state->plain);
}

/* ---------------------------------------------------------------------------
 * Text
 * ------------------------------------------------------------------------ */

/*
 * The text in UTF-8, or NULL if it cannot be that.  Also NULL beyond max
 * bytes, so that nothing later runs into the limit of a StringInfo.
 */
static const char *
convert_to_utf8(SmBodyState *state, const char *text, int len, int max)
{
	unsigned char *converted;
	Size		size;

	if (len > max)
		return NULL;
	if (state->to_utf8 == TO_UTF8_NOTHING || pg_is_ascii(text))
		return text;
	if (state->to_utf8 == TO_UTF8_VERIFY)
		return pg_encoding_verifymbstr(PG_UTF8, text, len) == len ? text : NULL;

	if (!OidIsValid(state->conversion))
		return NULL;
	size = (Size) len * MAX_CONVERSION_GROWTH + 1;
	converted = MemoryContextAllocHuge(state->scratch, size);
	if (pg_do_encoding_conversion_buf(state->conversion, GetDatabaseEncoding(), PG_UTF8,
									  (unsigned char *) unconstify(char *, text), len,
									  converted, size, true) != len)
		return NULL;
	return (const char *) converted;
}

/* Append a member whose value is a text; false if it cannot be sent. */
static bool
append_text(SmBody *body, StringInfo buf, const char *name, const char *before,
			const char *text, const char *after)
{
	SmBodyState *state = body->state;
	const char *utf8 = convert_to_utf8(state, text, strlen(text), MAX_ATTRIBUTE);

	if (utf8 == NULL)
	{
		snprintf(body->error, sizeof(body->error),
				 "%s cannot be sent: not valid in UTF-8, or longer than %d bytes",
				 name, MAX_ATTRIBUTE);
		return false;
	}
	appendStringInfoString(buf, ",\"");
	appendStringInfoString(buf, name);
	appendStringInfoString(buf, "\":");
	if (before[0] != '\0' || after[0] != '\0')
	{
		resetStringInfo(&state->text);
		appendStringInfoString(&state->text, before);
		appendStringInfoString(&state->text, utf8);
		appendStringInfoString(&state->text, after);
		utf8 = state->text.data;
	}
	escape_json(buf, utf8);
	return true;
}

/*
 * The event's source: a URI path, so what is no character of one (RFC 3986,
 * pchar) is percent-encoded.  What remains needs no escapes in JSON.
 */
static bool
append_source(SmBody *body, StringInfo buf, const char *branch_id)
{
	SmBodyState *state = body->state;

	if (state->branch_id == NULL || strcmp(state->branch_id, branch_id) != 0)
	{
		const char *utf8 = convert_to_utf8(state, branch_id, strlen(branch_id),
										   MAX_ATTRIBUTE);
		StringInfoData source;

		if (utf8 == NULL)
		{
			strlcpy(body->error,
					"branch_id cannot be sent: not valid in UTF-8, or too long",
					sizeof(body->error));
			return false;
		}
		initStringInfo(&source);
		for (const char *p = utf8; *p != '\0'; p++)
		{
			if (!IS_HIGHBIT_SET(*p) &&
				(isalnum((unsigned char) *p) || strchr("-._~!$&'()*+,;=:@", *p) != NULL))
				appendStringInfoChar(&source, *p);
			else
				appendStringInfo(&source, "%%%02X", (unsigned char) *p);
		}

		if (state->branch_id != NULL)
		{
			pfree(state->branch_id);
			pfree(state->source);
		}
		state->branch_id = pstrdup(branch_id);
		state->source = source.data;
	}

	APPEND_LITERAL(buf, ",\"source\":\"/branches/");
	appendStringInfoString(buf, state->source);
	appendStringInfoCharMacro(buf, '"');
	return true;
}

/* RFC 3339 in UTC.  False outside the years that it can write. */
static bool
append_time(SmBody *body, StringInfo buf, TimestampTz time)
{
	struct pg_tm tm;
	fsec_t		fsec;
	char		text[sizeof("2025-01-31T23:59:59.000000Z")];
	char	   *p = text;

	if (TIMESTAMP_NOT_FINITE(time) ||
		timestamp2tm(time, NULL, &tm, &fsec, NULL, NULL) != 0 ||
		tm.tm_year < 0 || tm.tm_year > 9999)
	{
		strlcpy(body->error, "time cannot be sent: not between the years 0000 and 9999",
				sizeof(body->error));
		return false;
	}
	p = pg_ultostr_zeropad(p, tm.tm_year, 4);
	*p++ = '-';
	p = pg_ultostr_zeropad(p, tm.tm_mon, 2);
	*p++ = '-';
	p = pg_ultostr_zeropad(p, tm.tm_mday, 2);
	*p++ = 'T';
	p = pg_ultostr_zeropad(p, tm.tm_hour, 2);
	*p++ = ':';
	p = pg_ultostr_zeropad(p, tm.tm_min, 2);
	*p++ = ':';
	p = pg_ultostr_zeropad(p, tm.tm_sec, 2);
	*p++ = '.';
	p = pg_ultostr_zeropad(p, fsec, 6);
	*p++ = 'Z';

	APPEND_LITERAL(buf, ",\"time\":\"");
	appendBinaryStringInfo(buf, text, p - text);
	appendStringInfoCharMacro(buf, '"');
	return true;
}

/* Write 16 bytes as a UUID; 36 characters and the zero. */
static void
format_uuid(char *out, const unsigned char *bytes)
{
	char		hex[2 * UUID_LEN];

	hex_encode((const char *) bytes, UUID_LEN, hex);
	memcpy(out, hex, 8);
	out[8] = '-';
	memcpy(out + 9, hex + 8, 4);
	out[13] = '-';
	memcpy(out + 14, hex + 12, 4);
	out[18] = '-';
	memcpy(out + 19, hex + 16, 4);
	out[23] = '-';
	memcpy(out + 24, hex + 20, 12);
	out[36] = '\0';
}

/* ---------------------------------------------------------------------------
 * Bodies
 * ------------------------------------------------------------------------ */

/* Where the next event is written. */
static StringInfo
plain_buffer(SmBody *body)
{
	return body->state->compress ? &body->state->plain : &body->out;
}

void
sm_wire_begin(SmBody *body, int level)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "softmobile body",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext caller = MemoryContextSwitchTo(context);
	SmBodyState *state = palloc0(sizeof(SmBodyState));

	memset(body, 0, sizeof(*body));
	body->state = state;
	initStringInfo(&body->out);
	initStringInfo(&state->plain);
	initStringInfo(&state->text);
	state->context = context;
	state->scratch = AllocSetContextCreate(context, "softmobile body text",
										   ALLOCSET_DEFAULT_SIZES);

	if (GetDatabaseEncoding() == PG_UTF8)
		state->to_utf8 = TO_UTF8_NOTHING;
	else if (GetDatabaseEncoding() == PG_SQL_ASCII)
		state->to_utf8 = TO_UTF8_VERIFY;
	else
	{
		state->to_utf8 = TO_UTF8_CONVERT;
		state->conversion = FindDefaultConversionProc(GetDatabaseEncoding(), PG_UTF8);
	}

	state->compress = level != SM_WIRE_PLAIN;
	if (state->compress)
	{
		state->zlib.zalloc = allocate_for_zlib;
		state->zlib.zfree = free_for_zlib;
		state->zlib.opaque = context;
		if (deflateInit2(&state->zlib, level, Z_DEFLATED, GZIP_WINDOW_BITS,
						 GZIP_MEMORY_LEVEL, Z_DEFAULT_STRATEGY) != Z_OK)
			ereport(ERROR,
					(errcode(ERRCODE_OUT_OF_MEMORY),
					 errmsg("could not initialize compression")));
	}

	appendStringInfoChar(plain_buffer(body), '[');
	body->raw_len = 1;
	MemoryContextSwitchTo(caller);
}

/* Append one event; on failure the buffer holds half of it, the error is set. */
static bool
append_event(SmBody *body, StringInfo buf, const SmEvent *event, const char *lane,
			 const char *epoch, int epoch_no)
{
	const char *payload;
	int			payload_len = event->payload_len;
	const char *suffix = event->op == 'u' ? ".update" :
		event->op == 'd' ? ".delete" : ".insert";
	char		number[32];
	char		id[37];

	format_uuid(id, event->id.data);
	APPEND_LITERAL(buf, "{\"specversion\":\"1.0\",\"id\":\"");
	appendBinaryStringInfo(buf, id, 36);
	appendStringInfoCharMacro(buf, '"');

	if (!append_source(body, buf, event->branch_id) ||
		!append_text(body, buf, "type", "softmobile.", event->entity_type, suffix) ||
		!append_text(body, buf, "subject", "", event->entity_id, "") ||
		!append_time(body, buf, event->created_at))
		return false;

	/* lane and epoch are words of our own, nothing in them needs an escape */
	APPEND_LITERAL(buf, ",\"datacontenttype\":\"application/json\",\"sequence\":\"");
	appendBinaryStringInfo(buf, number, pg_lltoa(event->seq, number));
	APPEND_LITERAL(buf, "\",\"lane\":\"");
	appendStringInfoString(buf, lane);
	APPEND_LITERAL(buf, "\",\"epoch\":\"");
	appendStringInfoString(buf, epoch);
	APPEND_LITERAL(buf, "\",\"epochno\":\"");
	appendBinaryStringInfo(buf, number, pg_ltoa(epoch_no, number));
	appendStringInfoCharMacro(buf, '"');

	if ((event->reason != NULL &&
		 !append_text(body, buf, "reason", "", event->reason, "")) ||
		(event->actor != NULL &&
		 !append_text(body, buf, "actor", "", event->actor, "")) ||
		(event->op == 's' &&
		 !append_text(body, buf, "snapshot", "", "true", "")) ||
		(event->resolution != NULL &&
		 !append_text(body, buf, "resolution", "", event->resolution, "")))
		return false;

	payload = convert_to_utf8(body->state, event->payload, payload_len, SM_WIRE_MAX_PAYLOAD);
	if (payload != NULL && payload != event->payload)
		payload_len = strlen(payload);
	if (payload == NULL || payload_len > 2 * SM_WIRE_MAX_PAYLOAD)
	{
		snprintf(body->error, sizeof(body->error),
				 "data cannot be sent: not valid in UTF-8, or longer than %d bytes",
				 SM_WIRE_MAX_PAYLOAD);
		return false;
	}
	APPEND_LITERAL(buf, ",\"data\":");
	appendBinaryStringInfo(buf, payload, payload_len);
	appendStringInfoCharMacro(buf, '}');
	return true;
}

/* Append an event.  False: it cannot be sent, body->error says why. */
bool
sm_wire_add(SmBody *body, const SmEvent *event, const char *lane, const char *epoch,
			int epoch_no)
{
	SmBodyState *state = body->state;
	StringInfo	buf = plain_buffer(body);
	MemoryContext caller = MemoryContextSwitchTo(state->context);
	int			start = buf->len;
	bool		added;

	body->error[0] = '\0';
	if (body->nevents > 0)
		appendStringInfoChar(buf, ',');
	added = append_event(body, buf, event, lane, epoch, epoch_no);
	if (added)
	{
		body->nevents++;
		body->raw_len += buf->len - start;
		if (state->compress && buf->len >= GZIP_CHUNK)
			compress_plain(body, Z_NO_FLUSH);
	}
	else
	{
		buf->len = start;
		buf->data[start] = '\0';
	}

	if (state->to_utf8 == TO_UTF8_CONVERT)
		MemoryContextReset(state->scratch);
	MemoryContextSwitchTo(caller);
	return added;
}

void
sm_wire_end(SmBody *body)
{
	SmBodyState *state = body->state;

	appendStringInfoChar(plain_buffer(body), ']');
	body->raw_len++;
	if (state->compress)
	{
		compress_plain(body, Z_FINISH);
		deflateEnd(&state->zlib);
	}
}

void
sm_wire_free(SmBody *body)
{
	MemoryContextDelete(body->state->context);
	memset(body, 0, sizeof(*body));
}

int64
sm_wire_size(const SmBody *body)
{
	return body->out.len + body->state->plain.len;
}

const char *
sm_wire_encoding(const SmBody *body)
{
	return body->state->compress ? "gzip" : NULL;
}

/* ---------------------------------------------------------------------------
 * Headers
 * ------------------------------------------------------------------------ */

void
sm_wire_traceparent(char out[SM_WIRE_TRACEPARENT_LEN], const uint8 trace_id[16])
{
	uint8		parent_id[8];
	char	   *p = out;

	if (!pg_strong_random(parent_id, sizeof(parent_id)))
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("could not generate random values")));
	parent_id[0] |= 1;			/* all zero would mean: none */

	memcpy(p, "00-", 3);
	p += 3;
	p += hex_encode((const char *) trace_id, 16, p);
	*p++ = '-';
	p += hex_encode((const char *) parent_id, sizeof(parent_id), p);
	memcpy(p, "-01", 4);
}

/*
 * The key names what is sent, not only which numbers: a copied database that
 * gives its numbers to other events must not be taken for a retry.
 */
void
sm_wire_idempotency_key(char out[SM_WIRE_KEY_LEN], const char *epoch, const char *lane,
						const SmEvent *events, int n)
{
	pg_cryptohash_ctx *hash;
	uint8		digest[PG_SHA256_DIGEST_LENGTH];
	bool		ok;

	Assert(CurrentResourceOwner != NULL);	/* OpenSSL's context is tracked by it */

	hash = pg_cryptohash_create(PG_SHA256);
	ok = hash != NULL && pg_cryptohash_init(hash) == 0 &&
		pg_cryptohash_update(hash, (const uint8 *) epoch, strlen(epoch) + 1) == 0 &&
		pg_cryptohash_update(hash, (const uint8 *) lane, strlen(lane) + 1) == 0;
	for (int i = 0; ok && i < n; i++)
	{
		uint64		seq = pg_hton64((uint64) events[i].seq);
		const char *resolution = events[i].resolution ? events[i].resolution : "";

		ok = pg_cryptohash_update(hash, (const uint8 *) &seq, sizeof(seq)) == 0 &&
			pg_cryptohash_update(hash, events[i].id.data, UUID_LEN) == 0 &&
			pg_cryptohash_update(hash, (const uint8 *) resolution,
								 strlen(resolution) + 1) == 0;
	}
	ok = ok && pg_cryptohash_final(hash, digest, sizeof(digest)) == 0;
	if (!ok)
		elog(ERROR, "could not compute an idempotency key: %s", pg_cryptohash_error(hash));
	pg_cryptohash_free(hash);

	/* RFC 9562: version 8, made by the application's own rule */
	digest[6] = (digest[6] & 0x0f) | 0x80;
	digest[8] = (digest[8] & 0x3f) | 0x80;
	format_uuid(out, digest);
}
