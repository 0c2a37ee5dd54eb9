/*
 * batch_fuzz.c
 *		A fuzzer for what branches send, as headquarters' database reads it
 *		(receive.c): it may refuse what it likes, and must take nothing that is no
 *		JSON, or that has another number of events.
 */
#include "backend_fuzz.h"

#define palloc fenced_palloc
#define palloc0 fenced_palloc0
#define pnstrdup fenced_pnstrdup
#include "receive.c"
#undef palloc
#undef palloc0
#undef pnstrdup

PG_MODULE_MAGIC;
PG_FUNCTION_INFO_V1(batch_fuzz);

/* of softmobile.central_event */
static const Oid column_types[SM_EVENT_COLUMNS] = {
	INT4OID, TEXTOID, UUIDOID, UUIDOID, INT4OID, TEXTOID, INT8OID, INT4OID, TEXTOID, TEXTOID, TEXTOID,
	TIMESTAMPTZOID, TEXTOID, TEXTOID, TEXTOID, JSONOID, JSONBOID, JSONBOID
};
static TupleDesc row_type;

#define EVENT(op, data) \
	"{\"specversion\":\"1.0\",\"id\":\"01890000-0000-7000-8000-000000000000\",\"source\":\"/branches/b%201\",\"type\":\"softmobile.sale." op "\"," \
	"\"subject\":\"S-1\",\"time\":\"2026-01-02T03:04:05.678901Z\",\"datacontenttype\":\"application/json\",\"sequence\":\"7\",\"lane\":\"high\"," \
	"\"epoch\":\"01890000-0000-4000-8000-000000000001\",\"epochno\":\"3\",\"actor\":\"x\",\"data\":" data "}"

static const char *const words[] = {
	"{", "}", "[", "]", ",", ":", "\"", "0", "1e400000", "-1.50", "99999999999999999999", "null", "true", "\"\"", "\\u0000", "\\ud83d\\ude00", "\\ud800", "\\", "\n", "\xc3\xa1",
	"\"specversion\":\"1.0\"", "\"id\":\"01890000-0000-7000-8000-000000000000\"", "\"source\":\"/branches/\"", "\"source\":\"/branches/%f1%\"",
	"\"type\":\"softmobile.sale.insert\"", "\"type\":\"softmobile.a.b.update\"", "\"type\":\"softmobile.sale.delete\"", "\"subject\":\"S\\u002d1\"", "\"time\":\"2026-13-02T03:04:05.678901Z\"",
	"\"time\":\"2026-01-02T03:04:05.678901Z\"", "\"sequence\":\"7\"", "\"sequence\":\"999999999999999999\"", "\"lane\":\"low\"", "\"epoch\":\"01890000-0000-4000-8000-000000000001\"",
	"\"epochno\":\"2147483648\"", "\"epochno\":\"3\"", "\"reason\":\"r\\u00e1\"", "\"actor\":\"\"", "\"snapshot\":\"true\"", "\"resolution\":\"local\"", "\"data\":", "{\"new\":", "\"old\":", "{\"a\":1,\"a\":2}",
	EVENT("insert", "{\"new\":{\"id\":1}}"), EVENT("update", "{\"new\":{\"id\":1,\"t\":[1,{}]},\"old\":{}}"), EVENT("delete", "{\"old\":{\"x\":\"\\u00e1\"}}"), EVENT("insert", ""),
	"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", "]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]",};

static void
check_batch(const char *body, int len)
{
	MemoryContext caller = CurrentMemoryContext;
	Datum	   *volatile rows = palloc(sizeof(Datum) * MAX_EVENTS);
	volatile int n = 0;

	PG_TRY();
	{
		n = read_batch(create_lexer(body, len, false), row_type, rows);
	}
	PG_CATCH();
	{
		int			category = ERRCODE_TO_CATEGORY(geterrcode());

		check(category == ERRCODE_DATA_EXCEPTION || category == ERRCODE_PROGRAM_LIMIT_EXCEEDED || category == ERRCODE_FEATURE_NOT_SUPPORTED, "an error is about the data");
		MemoryContextSwitchTo(caller);
		FlushErrorState();
	}
	PG_END_TRY();

	/* an ERROR would end this process */
	if (n > 0)
		check(DatumGetInt32(DirectFunctionCall1(json_array_length,
												DirectFunctionCall1(json_in, CStringGetDatum(pnstrdup(body, len))))) == n, "each event is a row");
}

static int
run_one(const uint8_t *data, size_t size)
{
	MemoryContext caller;
	char	   *body;
	int			len;

	if (size == 0)
		return 0;
	caller = MemoryContextSwitchTo(run_context);
	body = make_body(data, size, words, lengthof(words), &len);
	/* what a text can be */
	if (pg_verifymbstr(body, len, true))
		check_batch(body, len);
	MemoryContextSwitchTo(caller);
	MemoryContextReset(run_context);
	return 0;
}

/* batch_fuzz(VARIADIC arguments of libFuzzer text[]) */
Datum
batch_fuzz(PG_FUNCTION_ARGS)
{
	row_type = CreateTemplateTupleDesc(SM_EVENT_COLUMNS);
	for (int i = 0; i < SM_EVENT_COLUMNS; i++)
		TupleDescInitEntry(row_type, i + 1, "", column_types[i], -1, 0);
	BlessTupleDesc(row_type);
	run_fuzzer(PG_GETARG_ARRAYTYPE_P(0), run_one);
	PG_RETURN_NULL();
}
