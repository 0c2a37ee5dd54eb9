/*
 * receive.c
 *		Headquarters reads a batch of CloudEvents.
 *
 * Called by softmobile.central_receive(), in its transaction; takes no lock and
 * reads no table.
 *
 * PostgreSQL's lexer says what the tokens are.  In which order they come is
 * known, for our own worker wrote them; a batch that is anything else is not
 * judged here: central_receive() reads it again, event by event, slowly and with
 * an explanation (central_parse_event()).  So this may refuse whatever it likes,
 * and must take nothing that is no JSON or that would be read differently there.
 *
 * Reading each byte once, without the copies that the parser's callbacks would
 * get, takes a quarter of the time of json_to_recordset() and casts to jsonb.
 */
#include "postgres.h"

#include <ctype.h>

#include "access/htup_details.h"
#include "common/jsonapi.h"
#include "compat.h"
#include "fmgr.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "receive.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"
#include "uuid7.h"

PG_FUNCTION_INFO_V1(softmobile_central_parse);
PG_FUNCTION_INFO_V1(softmobile_central_decode);

/* More are refused by central_receive(). */
#define MAX_EVENTS		20000

/* Attributes of an event, in the order in which our worker writes them. */
typedef enum AttributeName
{
	ATTR_SPECVERSION,
	ATTR_ID,
	ATTR_SOURCE,
	ATTR_TYPE,
	ATTR_SUBJECT,
	ATTR_TIME,
	ATTR_DATACONTENTTYPE,
	ATTR_SEQUENCE,
	ATTR_LANE,
	ATTR_EPOCH,
	ATTR_EPOCHNO,
	ATTR_REASON,
	ATTR_ACTOR,
	ATTR_SNAPSHOT,
	ATTR_RESOLUTION,
	ATTR_DATA,
	N_ATTRIBUTES
} AttributeName;

static const char *const attribute_names[N_ATTRIBUTES] = {
	"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "sequence", "lane",
	"epoch", "epochno", "reason", "actor", "snapshot", "resolution", "data"
};

/* A piece of the body, or of what an escaped string stands for; data NULL: none. */
typedef struct Slice
{
	const char *data;
	int			len;
} Slice;

typedef struct Event
{
	Slice		attribute[N_ATTRIBUTES];
	Jsonb	   *new;			/* the members of data; NULL: none */
	Jsonb	   *old;
} Event;

static bool read_value(JsonLexContext *lex, JsonbParseState **state, bool element, JsonbValue **result);

/* ---------------------------------------------------------------------------
 * Tokens
 * ------------------------------------------------------------------------ */

static JsonLexContext *
create_lexer(const char *json, int len, bool resolve_escapes)
{
	return makeJsonLexContextCstringLen(NULL, json, len, GetDatabaseEncoding(), resolve_escapes);
}

/* Goes on to the next token, if this one is of that kind. */
static bool
skip_token(JsonLexContext *lex, JsonTokenType type)
{
	return lex->token_type == type && json_lex(lex) == JSON_SUCCESS;
}

/* What the string stands for that is the present token; goes on to the next one. */
static bool
read_string(JsonLexContext *lex, Slice *value)
{
	int			len = lex->token_terminator - lex->token_start;

	if (lex->token_type != JSON_TOKEN_STRING)
		return false;
	if (memchr(lex->token_start, '\\', len) == NULL)
		*value = (Slice) {lex->token_start + 1, len - 2};
	else
	{
		/* with escapes: once more, by a lexer that resolves them */
		JsonLexContext *inner = create_lexer(lex->token_start, len, true);

		if (json_lex(inner) != JSON_SUCCESS)
			return false;
		*value = (Slice) {inner->strval->data, inner->strval->len};
	}
	return json_lex(lex) == JSON_SUCCESS;
}

static bool
slice_is(const Slice *slice, const char *text)
{
	return slice->data != NULL && slice->len == (int) strlen(text) && memcmp(slice->data, text, slice->len) == 0;
}

/* ---------------------------------------------------------------------------
 * Rows, as jsonb
 * ------------------------------------------------------------------------ */

/* members: how many there are, before those of the same name become one. */
static bool
read_object(JsonLexContext *lex, JsonbParseState **state, JsonbValue **result, int *members)
{
	JsonbValue	key = {.type = jbvString};
	Slice		name;

	*members = 0;
	pushJsonbValue(state, WJB_BEGIN_OBJECT, NULL);
	if (!skip_token(lex, JSON_TOKEN_OBJECT_START))
		return false;
	while (lex->token_type != JSON_TOKEN_OBJECT_END)
	{
		if (!read_string(lex, &name) || !skip_token(lex, JSON_TOKEN_COLON))
			return false;
		key.val.string.val = unconstify(char *, name.data);
		key.val.string.len = name.len;
		pushJsonbValue(state, WJB_KEY, &key);
		(*members)++;
		if (!read_value(lex, state, false, result))
			return false;
		if (lex->token_type != JSON_TOKEN_OBJECT_END &&
			(!skip_token(lex, JSON_TOKEN_COMMA) || lex->token_type != JSON_TOKEN_STRING))
			return false;
	}
	*result = pushJsonbValue(state, WJB_END_OBJECT, NULL);
	return json_lex(lex) == JSON_SUCCESS;
}

static bool
read_array(JsonLexContext *lex, JsonbParseState **state, JsonbValue **result)
{
	pushJsonbValue(state, WJB_BEGIN_ARRAY, NULL);
	if (!skip_token(lex, JSON_TOKEN_ARRAY_START))
		return false;
	while (lex->token_type != JSON_TOKEN_ARRAY_END)
	{
		if (!read_value(lex, state, true, result))
			return false;
		if (lex->token_type != JSON_TOKEN_ARRAY_END &&
			(!skip_token(lex, JSON_TOKEN_COMMA) || lex->token_type == JSON_TOKEN_ARRAY_END))
			return false;
	}
	*result = pushJsonbValue(state, WJB_END_ARRAY, NULL);
	return json_lex(lex) == JSON_SUCCESS;
}

/* Any value, as part of an object or (element) of an array. */
static bool
read_value(JsonLexContext *lex, JsonbParseState **state, bool element, JsonbValue **result)
{
	JsonbValue	value;
	Slice		slice;
	int			members;

	check_stack_depth();
	switch (lex->token_type)
	{
		case JSON_TOKEN_OBJECT_START:
			return read_object(lex, state, result, &members);
		case JSON_TOKEN_ARRAY_START:
			return read_array(lex, state, result);
		case JSON_TOKEN_STRING:
			value.type = jbvString;
			if (!read_string(lex, &slice) || slice.len > JENTRY_OFFLENMASK)
				return false;
			value.val.string.val = unconstify(char *, slice.data);
			value.val.string.len = slice.len;
			pushJsonbValue(state, element ? WJB_ELEM : WJB_VALUE, &value);
			return true;
		case JSON_TOKEN_NUMBER:
			value.type = jbvNumeric;
			value.val.numeric = DatumGetNumeric(DirectFunctionCall3(numeric_in,
				CStringGetDatum(pnstrdup(lex->token_start, lex->token_terminator - lex->token_start)),
				ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1)));
			break;
		case JSON_TOKEN_TRUE:
		case JSON_TOKEN_FALSE:
			value.type = jbvBool;
			value.val.boolean = lex->token_type == JSON_TOKEN_TRUE;
			break;
		case JSON_TOKEN_NULL:
			value.type = jbvNull;
			break;
		default:
			return false;
	}
	pushJsonbValue(state, element ? WJB_ELEM : WJB_VALUE, &value);
	return json_lex(lex) == JSON_SUCCESS;
}

/*
 * {"new":{...},"old":{...}}, or one of them; its text as it stands is the attribute.
 * A row has each column once.
 */
static bool
read_data(JsonLexContext *lex, Event *event)
{
	Slice		text = {lex->token_start, 0};
	Slice		name;

	if (!skip_token(lex, JSON_TOKEN_OBJECT_START))
		return false;
	do
	{
		JsonbParseState *state = NULL;
		JsonbValue *object;
		Jsonb	  **row;
		int			members;

		if (!read_string(lex, &name) || !skip_token(lex, JSON_TOKEN_COLON))
			return false;
		row = slice_is(&name, "new") ? &event->new : &event->old;
		if ((row == &event->old && !slice_is(&name, "old")) || *row != NULL ||
			!read_object(lex, &state, &object, &members) || object->val.object.nPairs != members)
			return false;
		*row = JsonbValueToJsonb(object);
	} while (skip_token(lex, JSON_TOKEN_COMMA));

	text.len = lex->token_terminator - text.data;
	event->attribute[ATTR_DATA] = text;
	return skip_token(lex, JSON_TOKEN_OBJECT_END);
}

/* ---------------------------------------------------------------------------
 * Events
 * ------------------------------------------------------------------------ */

/* Which attribute it is, sought from the one on that our worker would write next. */
static int
find_attribute(const Slice *name, int next)
{
	for (int i = 0; i < N_ATTRIBUTES; i++)
		if (slice_is(name, attribute_names[(next + i) % N_ATTRIBUTES]))
			return (next + i) % N_ATTRIBUTES;
	return -1;
}

/* An event's attributes: those that we know, each once. */
static bool
read_event(JsonLexContext *lex, Event *event)
{
	int			which = -1;

	memset(event, 0, sizeof(*event));
	if (!skip_token(lex, JSON_TOKEN_OBJECT_START))
		return false;
	do
	{
		Slice		name;

		if (!read_string(lex, &name) || !skip_token(lex, JSON_TOKEN_COLON))
			return false;
		which = find_attribute(&name, which + 1);
		if (which < 0 || event->attribute[which].data != NULL)
			return false;
		if (which == ATTR_DATA ? !read_data(lex, event) : !read_string(lex, &event->attribute[which]))
			return false;
	} while (skip_token(lex, JSON_TOKEN_COMMA));
	return skip_token(lex, JSON_TOKEN_OBJECT_END);
}

/* softmobile.<entity type>.<operation>, and the rows that the operation has. */
static bool
split_type(const Event *event, Slice *entity_type, Slice *op)
{
	static const char prefix[] = "softmobile.";
	const int	prefix_len = sizeof(prefix) - 1;
	const Slice *type = &event->attribute[ATTR_TYPE];
	const char *dot;

	if (type->len <= prefix_len || memcmp(type->data, prefix, prefix_len) != 0)
		return false;
	entity_type->data = type->data + prefix_len;
	dot = memchr(entity_type->data, '.', type->len - prefix_len);
	if (dot == NULL)
		return false;
	entity_type->len = dot - entity_type->data;
	op->data = dot + 1;
	op->len = type->data + type->len - op->data;
	if (entity_type->len < 1 || entity_type->len > 100)
		return false;
	return slice_is(op, "insert") ? event->new != NULL && event->old == NULL :
		slice_is(op, "update") ? event->new != NULL && event->old != NULL :
		slice_is(op, "delete") && event->new == NULL && event->old != NULL;
}

/* A positive number: digits, and no more of them than fit. */
static bool
read_number(const Slice *slice, int64 *number)
{
	*number = 0;
	if (slice->len > 18)
		return false;
	for (int i = 0; i < slice->len; i++)
	{
		if (!isdigit((unsigned char) slice->data[i]))
			return false;
		*number = *number * 10 + (slice->data[i] - '0');
	}
	return *number > 0;
}

/* RFC 3339 in UTC, to the microsecond, as our worker writes it. */
static bool
read_time(const Slice *slice, Datum *time)
{
	static const char shape[] = "dddd-dd-ddTdd:dd:dd.ddddddZ";
	char		text[sizeof(shape)];

	if (slice->len != sizeof(shape) - 1)
		return false;
	for (int i = 0; i < slice->len; i++)
		if (shape[i] == 'd' ? !isdigit((unsigned char) slice->data[i]) : shape[i] != slice->data[i])
			return false;
	memcpy(text, slice->data, slice->len);
	text[slice->len] = '\0';
	*time = DirectFunctionCall3(timestamptz_in, CStringGetDatum(text), ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1));
	return true;
}

/*
 * Undoes percent-encoding, which is of UTF-8.  A percent sign that is followed by
 * anything else stands for itself.  Error of class 22 when it was no UTF-8.
 */
static text *
decode_percent(const char *source, int len)
{
	const char *utf8;
	char	   *bytes;
	char	   *result;
	int			n = 0;

	if (memchr(source, '%', len) == NULL)
		return cstring_to_text_with_len(source, len);
	utf8 = pg_server_to_any(pnstrdup(source, len), len, PG_UTF8);
	len = strlen(utf8);
	bytes = palloc(len + 1);
	for (int i = 0; i < len; i++)
	{
		if (utf8[i] == '%' && i + 2 < len && isxdigit((unsigned char) utf8[i + 1]) && isxdigit((unsigned char) utf8[i + 2]))
		{
			hex_decode(utf8 + i + 1, 2, bytes + n++);
			i += 2;
		}
		else
			bytes[n++] = utf8[i];
	}
	bytes[n] = '\0';
	result = pg_any_to_server(bytes, n, PG_UTF8);
	return cstring_to_text_with_len(result, result == bytes ? n : strlen(result));
}

static void
set_text(Datum *values, bool *nulls, int column, const Slice *slice)
{
	nulls[column] = slice->data == NULL;
	if (!nulls[column])
		values[column] = PointerGetDatum(cstring_to_text_with_len(slice->data, slice->len));
}

/* An event as a row; false: it is not as our worker writes them. */
static bool
form_event(const Event *event, int n, Datum *values, bool *nulls)
{
	const Slice *attribute = event->attribute;
	const Slice *source = &attribute[ATTR_SOURCE];
	static const char path[] = "/branches/";
	const int	path_len = sizeof(path) - 1;
	Slice		entity_type;
	Slice		op;
	pg_uuid_t  *id = palloc(sizeof(pg_uuid_t));
	pg_uuid_t  *epoch = palloc(sizeof(pg_uuid_t));
	int64		seq;
	int64		epoch_no;

	if (!slice_is(&attribute[ATTR_SPECVERSION], "1.0") || !split_type(event, &entity_type, &op) ||
		source->len <= path_len || memcmp(source->data, path, path_len) != 0 ||
		attribute[ATTR_SUBJECT].len < 1 || attribute[ATTR_SUBJECT].len > 2000 ||
		!(slice_is(&attribute[ATTR_LANE], "high") || slice_is(&attribute[ATTR_LANE], "normal") || slice_is(&attribute[ATTR_LANE], "low")) ||
		!(attribute[ATTR_RESOLUTION].data == NULL ||
		  slice_is(&attribute[ATTR_RESOLUTION], "local") || slice_is(&attribute[ATTR_RESOLUTION], "central")) ||
		!sm_uuid7_read(attribute[ATTR_ID].data, attribute[ATTR_ID].len, id) ||
		!sm_uuid7_read(attribute[ATTR_EPOCH].data, attribute[ATTR_EPOCH].len, epoch) ||
		!read_number(&attribute[ATTR_SEQUENCE], &seq) ||
		!read_number(&attribute[ATTR_EPOCHNO], &epoch_no) || epoch_no > PG_INT32_MAX ||
		!read_time(&attribute[ATTR_TIME], &values[SM_EVENT_EVENT_TIME]))
		return false;

	values[SM_EVENT_N] = Int32GetDatum(n);
	values[SM_EVENT_BRANCH_ID] = PointerGetDatum(decode_percent(source->data + path_len, source->len - path_len));
	values[SM_EVENT_ID] = UUIDPGetDatum(id);
	values[SM_EVENT_EPOCH] = UUIDPGetDatum(epoch);
	values[SM_EVENT_SEQ] = Int64GetDatum(seq);
	values[SM_EVENT_EPOCH_NO] = Int32GetDatum(epoch_no);
	/* rows that were there when the table was attached are older than any other event */
	values[SM_EVENT_ORDER_EPOCH] = Int32GetDatum(slice_is(&attribute[ATTR_SNAPSHOT], "true") ? 0 : epoch_no);
	set_text(values, nulls, SM_EVENT_LANE, &attribute[ATTR_LANE]);
	set_text(values, nulls, SM_EVENT_ENTITY_TYPE, &entity_type);
	set_text(values, nulls, SM_EVENT_ENTITY_ID, &attribute[ATTR_SUBJECT]);
	set_text(values, nulls, SM_EVENT_OP, &op);
	set_text(values, nulls, SM_EVENT_ACTOR, &attribute[ATTR_ACTOR]);
	set_text(values, nulls, SM_EVENT_REASON, &attribute[ATTR_REASON]);
	set_text(values, nulls, SM_EVENT_RESOLUTION, &attribute[ATTR_RESOLUTION]);
	set_text(values, nulls, SM_EVENT_DATA, &attribute[ATTR_DATA]);
	nulls[SM_EVENT_NEW] = event->new == NULL;
	values[SM_EVENT_NEW] = PointerGetDatum(event->new);
	nulls[SM_EVENT_OLD] = event->old == NULL;
	values[SM_EVENT_OLD] = PointerGetDatum(event->old);
	return true;
}

/*
 * All events of a body, as rows; their number, or 0 when they are not ours to
 * read.  Each leaves nothing but its row in memory.
 */
static int
read_batch(JsonLexContext *lex, TupleDesc tupdesc, Datum *rows)
{
	MemoryContext caller = CurrentMemoryContext;
	MemoryContext event_cxt = AllocSetContextCreate(caller, "softmobile event", ALLOCSET_DEFAULT_SIZES);
	int			n = 0;
	bool		good;

	good = json_lex(lex) == JSON_SUCCESS && skip_token(lex, JSON_TOKEN_ARRAY_START);
	while (good)
	{
		Event		event;
		Datum		values[SM_EVENT_COLUMNS];
		bool		nulls[SM_EVENT_COLUMNS] = {false};

		MemoryContextSwitchTo(event_cxt);
		good = n < MAX_EVENTS && read_event(lex, &event) && form_event(&event, n + 1, values, nulls);
		MemoryContextSwitchTo(caller);
		if (good)
			rows[n++] = HeapTupleGetDatum(heap_form_tuple(tupdesc, values, nulls));
		MemoryContextReset(event_cxt);
		if (!good || !skip_token(lex, JSON_TOKEN_COMMA))
			break;
	}
	good = good && skip_token(lex, JSON_TOKEN_ARRAY_END) && lex->token_type == JSON_TOKEN_END;
	MemoryContextDelete(event_cxt);
	return good ? n : 0;
}

/* ---------------------------------------------------------------------------
 * Events that were read
 * ------------------------------------------------------------------------ */

void
sm_event_rows_open(SmEventRows *events, ArrayType *array)
{
	events->desc = lookup_rowtype_tupdesc(ARR_ELEMTYPE(array), -1);
	if (events->desc->natts != SM_EVENT_COLUMNS)
		elog(ERROR, "softmobile.central_event has %d columns, not %d", events->desc->natts, SM_EVENT_COLUMNS);
	deconstruct_array(array, ARR_ELEMTYPE(array), -1, false, TYPALIGN_DOUBLE, &events->rows, NULL, &events->n);
}

/* An event's values; they lie in the array. */
void
sm_event_rows_get(const SmEventRows *events, int i, Datum *values, bool *nulls)
{
	HeapTupleHeader header = DatumGetHeapTupleHeader(events->rows[i]);
	HeapTupleData tuple = {.t_len = HeapTupleHeaderGetDatumLength(header), .t_data = header};

	heap_deform_tuple(&tuple, events->desc, values, nulls);
}

void
sm_event_rows_close(SmEventRows *events)
{
	ReleaseTupleDesc(events->desc);
}

/* softmobile.central_parse(body text) -> softmobile.central_event[] */
Datum
softmobile_central_parse(PG_FUNCTION_ARGS)
{
	text	   *body = PG_GETARG_TEXT_PP(0);
	Oid			type = get_element_type(get_fn_expr_rettype(fcinfo->flinfo));
	TupleDesc	tupdesc = lookup_rowtype_tupdesc(type, -1);
	Datum	   *rows = palloc(sizeof(Datum) * MAX_EVENTS);
	JsonLexContext *lex = create_lexer(VARDATA_ANY(body), VARSIZE_ANY_EXHDR(body), false);
	int			n;

	if (tupdesc->natts != SM_EVENT_COLUMNS)
		elog(ERROR, "softmobile.central_event has %d columns, not %d", tupdesc->natts, SM_EVENT_COLUMNS);
	n = read_batch(lex, tupdesc, rows);
	ReleaseTupleDesc(tupdesc);
	if (n == 0)
		PG_RETURN_NULL();
	PG_RETURN_ARRAYTYPE_P(construct_array(rows, n, type, -1, false, TYPALIGN_DOUBLE));
}

/* softmobile.central_decode(value text) -> text */
Datum
softmobile_central_decode(PG_FUNCTION_ARGS)
{
	text	   *value = PG_GETARG_TEXT_PP(0);

	PG_RETURN_TEXT_P(decode_percent(VARDATA_ANY(value), VARSIZE_ANY_EXHDR(value)));
}
