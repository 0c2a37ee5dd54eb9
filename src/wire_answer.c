/*
 * wire_answer.c
 *		What comes back over the wire: receipts and problem documents.
 *
 * Called by the sync worker when a request was answered.  The body may come
 * from anybody (a captive portal answers 200 to everything), so it is
 * believed only if it accounts for each event of the batch, and nothing in it
 * may raise an ERROR: that would end the worker, which would send the same
 * batch again and get the same answer.
 *
 * The server's own parser reads it, as jsonb, under a PG_TRY that lets nothing
 * pass but complaints about data.  The parser holds no resources when it
 * complains, only memory, which is in a context of its own.
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "uuid7.h"
#include "wire.h"

/*
 * Deeper documents are refused: whoever stores `current` parses it again, on a
 * deeper stack.
 */
#define MAX_NESTING 100

/*
 * Longer ones too: up to here the parser's arrays stay below the largest
 * allocation.  The caller's limit on answers is far below.
 */
#define MAX_ANSWER (16 * 1024 * 1024)

/* ---------------------------------------------------------------------------
 * Parsing
 * ------------------------------------------------------------------------ */

/* Brackets open at once, at most; for text that may or may not be JSON. */
static int
nesting_depth(const char *text, size_t len)
{
	int			depth = 0;
	int			deepest = 0;
	bool		in_string = false;

	for (size_t i = 0; i < len; i++)
	{
		if (in_string)
		{
			if (text[i] == '\\')
				i++;
			else if (text[i] == '"')
				in_string = false;
		}
		else if (text[i] == '"')
			in_string = true;
		else if (text[i] == '[' || text[i] == '{')
		{
			depth++;
			deepest = Max(deepest, depth);
		}
		else if (text[i] == ']' || text[i] == '}')
			depth--;
	}
	return deepest;
}

/*
 * UTF-8 in the server's encoding.  What this cannot hold becomes a question
 * mark: an odd character in a remark must not make a receipt worthless.
 */
static char *
convert_from_utf8(const char *text, size_t len)
{
	int			encoding = GetDatabaseEncoding();
	Oid			conversion;
	StringInfoData result;
	unsigned char *buf;
	size_t		bufsize = len * MAX_CONVERSION_GROWTH + 1;

	if (encoding == PG_UTF8 || encoding == PG_SQL_ASCII)
		return pnstrdup(text, len);

	initStringInfo(&result);
	buf = palloc(bufsize);
	conversion = FindDefaultConversionProc(PG_UTF8, encoding);
	while (len > 0)
	{
		int			done = 0;

		if (OidIsValid(conversion))
		{
			done = pg_do_encoding_conversion_buf(conversion, PG_UTF8, encoding,
												 (unsigned char *) unconstify(char *, text),
												 len, buf, bufsize, true);
			appendStringInfoString(&result, (char *) buf);
			text += done;
			len -= done;
		}
		if (len > 0)
		{
			int			char_len = pg_utf_mblen((const unsigned char *) text);

			appendStringInfoChar(&result, IS_HIGHBIT_SET(*text) ? '?' : *text);
			text += char_len;
			len -= char_len;
		}
	}
	return result.data;
}

/*
 * Replace, in place, escapes for what a text of this server cannot hold by the
 * escape for a question mark.  Returns false if there was nothing to replace.
 */
static bool
replace_odd_escapes(char *text)
{
	bool		replaced = false;

	for (char *p = strchr(text, '\\'); p != NULL; p = strchr(p, '\\'))
	{
		char		digits[5];
		unsigned long code;

		if (*++p == '\0')
			break;
		strlcpy(digits, p + 1, sizeof(digits));
		if (*p++ != 'u' || strspn(digits, "0123456789abcdefABCDEF") != 4)
			continue;
		code = strtoul(digits, NULL, 16);
		if (code == 0 || (code >= 0xd800 && code <= 0xdfff) ||
			(code >= 0x80 && GetDatabaseEncoding() != PG_UTF8))
		{
			memcpy(p, "003f", 4);
			replaced = true;
		}
	}
	return replaced;
}

/* jsonb_in() without an ERROR: NULL if the text is no JSON that jsonb can hold. */
static Jsonb *
read_jsonb(char *text)
{
	MemoryContext caller = CurrentMemoryContext;
	Datum		volatile result = (Datum) 0;

	PG_TRY();
	{
		result = DirectFunctionCall1(jsonb_in, CStringGetDatum(text));
	}
	PG_CATCH();
	{
		int			category = ERRCODE_TO_CATEGORY(geterrcode());

		/*
		 * Cancellation and want of memory are not the document's fault.  "Not
		 * supported" is: escapes beyond ASCII on a server of SQL_ASCII.
		 */
		if (category != ERRCODE_DATA_EXCEPTION &&
			category != ERRCODE_PROGRAM_LIMIT_EXCEEDED &&
			category != ERRCODE_FEATURE_NOT_SUPPORTED)
			PG_RE_THROW();
		MemoryContextSwitchTo(caller);
		FlushErrorState();
	}
	PG_END_TRY();

	return result == (Datum) 0 ? NULL : DatumGetJsonbP(result);
}

/* Parse a body into CurrentMemoryContext; NULL with a reason if it is no JSON object. */
static Jsonb *
parse_object(const char *body, size_t len, const char **why)
{
	char	   *text;
	Jsonb	   *document;

	if (len == 0)
		*why = "the body is empty";
	else if (len > MAX_ANSWER)
		*why = "the body is too long";
	else if (pg_encoding_verifymbstr(PG_UTF8, body, (int) len) != (int) len)
		*why = "the body is not UTF-8";
	else if (nesting_depth(body, len) > MAX_NESTING)
		*why = "the body is nested too deeply";
	else
	{
		text = convert_from_utf8(body, len);
		document = read_jsonb(text);
		if (document == NULL && replace_odd_escapes(text))
			document = read_jsonb(text);
		if (document == NULL)
			*why = "the body is not JSON";
		else if (!JB_ROOT_IS_OBJECT(document))
			*why = "the body is not a JSON object";
		else
			return document;
	}
	return NULL;
}

static JsonbValue *
get_member(JsonbContainer *object, const char *name)
{
	return getKeyJsonValueFromContainer(object, name, strlen(name), NULL);
}

/* A text from outside, for tables and logs: control characters out, cut. */
static char *
clean_text(const JsonbValue *value)
{
	const char *source = value->val.string.val;
	int			len = value->val.string.len;
	char	   *text = palloc(len + 1);
	int			n = 0;

	for (int i = 0; i < len; i++)
	{
		unsigned char c = (unsigned char) source[i];

		/* U+0080 to U+009F command terminals, too */
		if (c == 0xc2 && i + 1 < len && (unsigned char) source[i + 1] < 0xa0 &&
			GetDatabaseEncoding() == PG_UTF8)
			c = source[++i] & 0x1f;

		if (c >= 0x20 && c != 0x7f)
			text[n++] = (char) c;
		else if (n > 0 && text[n - 1] != ' ')
			text[n++] = ' ';
	}
	n = pg_mbcharcliplen(text, n, SM_WIRE_MAX_DETAIL);
	while (n > 0 && text[n - 1] == ' ')
		n--;
	text[n] = '\0';
	return text;
}

/* ---------------------------------------------------------------------------
 * Receipts
 * ------------------------------------------------------------------------ */

/* A count of events: digits only, and no more than any batch can have. */
static bool
get_count(JsonbContainer *object, const char *name, int *count)
{
	JsonbValue *value = get_member(object, name);
	char	   *digits;

	if (value == NULL || value->type != jbvNumeric)
		return false;
	digits = DatumGetCString(DirectFunctionCall1(numeric_out,
												 NumericGetDatum(value->val.numeric)));
	if (strlen(digits) > 9 || strspn(digits, "0123456789") != strlen(digits))
		return false;
	*count = atoi(digits);
	return true;
}

static int
compare_ids(const void *a, const void *b, void *arg)
{
	const SmEvent *events = (const SmEvent *) arg;

	return memcmp(&events[*(const int *) a].id, &events[*(const int *) b].id,
				  sizeof(pg_uuid_t));
}

static int
compare_id_to_event(const void *key, const void *element, void *arg)
{
	const SmEvent *events = (const SmEvent *) arg;

	return memcmp(key, &events[*(const int *) element].id, sizeof(pg_uuid_t));
}

/* One element of results; NULL if it is fine, else what is wrong. */
static const char *
read_verdict(const JsonbValue *element, SmEventVerdict *verdict, const SmEvent *events, int n,
			 const int *by_id, bool *named, MemoryContext destination)
{
	JsonbContainer *object;
	JsonbValue *value;
	pg_uuid_t	id;
	int		   *found;
	char	   *text;

	if (element->type != jbvBinary || !JsonContainerIsObject(element->val.binary.data))
		return "an element of results is not an object";
	object = element->val.binary.data;

	value = get_member(object, "id");
	if (value == NULL || value->type != jbvString ||
		!sm_uuid7_read(value->val.string.val, value->val.string.len, &id))
		return "an element of results has no id";
	found = bsearch_arg(&id, by_id, n, sizeof(int), compare_id_to_event,
						unconstify(SmEvent *, events));
	if (found == NULL)
		return "results name an event that is not in the batch";
	if (named[*found])
		return "results name an event twice";
	named[*found] = true;
	verdict->event = *found;

	value = get_member(object, "status");
	if (value != NULL && value->type == jbvString && value->val.string.len == 8 &&
		memcmp(value->val.string.val, "conflict", 8) == 0)
		verdict->conflict = true;
	else if (value != NULL && value->type == jbvString && value->val.string.len == 8 &&
			 memcmp(value->val.string.val, "rejected", 8) == 0)
		verdict->conflict = false;
	else
		return "results have an unknown status";

	value = get_member(object, "detail");
	text = value != NULL && value->type == jbvString ? clean_text(value) : "";
	verdict->detail = MemoryContextStrdup(destination, text);

	value = get_member(object, "current");
	if (value != NULL)
	{
		text = JsonbToCString(NULL, &JsonbValueToJsonb(value)->root, 0);
		verdict->current = MemoryContextStrdup(destination, text);
	}
	return NULL;
}

/* The whole document; NULL if it is a receipt for these events, else what is wrong. */
static const char *
read_receipt(JsonbContainer *root, const SmEvent *events, int n, SmReceipt *out,
			 MemoryContext destination)
{
	JsonbValue *results = get_member(root, "results");
	JsonbContainer *list;
	int		   *by_id;
	bool	   *named;

	if (!get_count(root, "accepted", &out->accepted))
		return "accepted is not a count";
	if (!get_count(root, "duplicates", &out->duplicates))
		return "duplicates is not a count";
	if (results == NULL || results->type != jbvBinary ||
		!JsonContainerIsArray(results->val.binary.data))
		return "results is not an array";
	list = results->val.binary.data;
	if ((int64) out->accepted + out->duplicates + JsonContainerSize(list) != n)
		return "the counts do not add up to the batch";

	out->nverdicts = JsonContainerSize(list);
	if (out->nverdicts == 0)
		return NULL;

	out->verdicts = MemoryContextAllocZero(destination, out->nverdicts * sizeof(SmEventVerdict));
	named = palloc0(n * sizeof(bool));
	by_id = palloc(n * sizeof(int));
	for (int i = 0; i < n; i++)
		by_id[i] = i;
	qsort_arg(by_id, n, sizeof(int), compare_ids, unconstify(SmEvent *, events));

	for (int i = 0; i < out->nverdicts; i++)
	{
		const char *wrong = read_verdict(getIthJsonbValueFromContainer(list, i),
										 &out->verdicts[i], events, n, by_id, named,
										 destination);

		if (wrong != NULL)
			return wrong;
	}
	return NULL;
}

bool
sm_wire_receipt(const char *body, size_t len, const SmEvent *events, int n, SmReceipt *out)
{
	MemoryContext destination = CurrentMemoryContext;
	MemoryContext context = AllocSetContextCreate(destination, "softmobile receipt",
												  ALLOCSET_DEFAULT_SIZES);
	const char *wrong = NULL;
	Jsonb	   *document;

	memset(out, 0, sizeof(*out));
	MemoryContextSwitchTo(context);
	document = parse_object(body, len, &wrong);
	if (document != NULL)
		wrong = read_receipt(&document->root, events, n, out, destination);
	MemoryContextSwitchTo(destination);
	MemoryContextDelete(context);

	if (wrong == NULL)
		return true;

	/* what was read before the fault is not to be used */
	memset(out, 0, sizeof(*out));
	snprintf(out->error, sizeof(out->error), "no receipt: %s", wrong);
	return false;
}

/* ---------------------------------------------------------------------------
 * Problem documents
 * ------------------------------------------------------------------------ */

/* Is it the media type, whatever parameters follow? */
static bool
is_media_type(const char *content_type, const char *type)
{
	size_t		len = strlen(type);

	return pg_strncasecmp(content_type, type, len) == 0 &&
		(content_type[len] == '\0' || content_type[len] == ';' || content_type[len] == ' ');
}

/* Plain JSON is read too: many servers have the members but not the media type. */
char *
sm_wire_problem(const char *body, size_t len, const char *content_type)
{
	MemoryContext destination = CurrentMemoryContext;
	MemoryContext context;
	const char *wrong;
	Jsonb	   *document;
	char	   *detail = NULL;

	if (content_type == NULL || (!is_media_type(content_type, "application/problem+json") &&
								 !is_media_type(content_type, "application/json")))
		return NULL;

	context = AllocSetContextCreate(destination, "softmobile problem",
									ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(context);
	document = parse_object(body, len, &wrong);
	if (document != NULL)
	{
		JsonbValue *value = get_member(&document->root, "detail");

		if (value == NULL || value->type != jbvString)
			value = get_member(&document->root, "title");
		if (value != NULL && value->type == jbvString)
			detail = clean_text(value);
		if (detail != NULL && detail[0] == '\0')
			detail = NULL;
	}
	MemoryContextSwitchTo(destination);
	if (detail != NULL)
		detail = pstrdup(detail);
	MemoryContextDelete(context);
	return detail;
}
