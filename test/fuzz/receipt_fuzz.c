/*
 * receipt_fuzz.c
 *		A fuzzer for what central answers: receipts and problem documents.
 */
#include "backend_fuzz.h"

#define MAX_EVENTS	4

#define palloc fenced_palloc
#define palloc0 fenced_palloc0
#define pnstrdup fenced_pnstrdup
#include "wire_answer.c"
#undef palloc
#undef palloc0
#undef pnstrdup

PG_MODULE_MAGIC;
PG_FUNCTION_INFO_V1(receipt_fuzz);

static SmEvent events[MAX_EVENTS];

/* Words of receipts and of problem documents; byte n of an input is word n modulo their number. */
static const char *const words[] = {
	"{", "}", "[", "]", ",", ":", "\"", "0", "1", "2", "4", "-1", "1e0", "1.0", "999999999", "4294967297",
	"\"accepted\":", "\"duplicates\":", "\"results\":", "\"id\":", "\"status\":", "\"detail\":", "\"current\":", "\"title\":",
	"\"conflict\"", "\"rejected\"", "\"accepted\"", "null", "true", "\"\"", "\\u0000", "\\ud800", "\\u00e1", "\\u0085", "\\", "\n", "\xc3\xa1", "\xc2\x85", "\xff",
	"\"01890000-0000-7000-8000-000000000000\"", "\"01890000-0000-7000-8000-000000000001\"",
	"\"01890000-0000-7000-8000-000000000002\"", "\"01890000-0000-7000-8000-00000000000G\"",
	"{\"accepted\":0,\"duplicates\":0,\"results\":[", "{\"accepted\":1,\"duplicates\":0,\"results\":[", "]}",
	"{\"id\":\"01890000-0000-7000-8000-000000000000\",\"status\":\"conflict\"", "{\"id\":\"01890000-0000-7000-8000-000000000001\",\"status\":\"rejected\"",
	"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", "]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]",};

/* What goes into tables and logs. */
static void
check_text(const char *text)
{
	check(pg_verifymbstr(text, (int) strlen(text), true), "text is valid in the server's encoding");
	check(pg_mbstrlen(text) <= SM_WIRE_MAX_DETAIL, "text is cut");
	for (const char *c = text; *c != '\0'; c++)
		check((unsigned char) *c >= 0x20 && *c != 0x7f, "text has no control characters");
}

static void
check_receipt(const char *body, size_t len, int n)
{
	SmReceipt	receipt;
	bool		seen[MAX_EVENTS] = {false};

	if (!sm_wire_receipt(body, len, events, n, &receipt))
	{
		check(strncmp(receipt.error, "no receipt: ", 12) == 0, "a refusal says why");
		check(receipt.nverdicts == 0 && receipt.accepted == 0 && receipt.duplicates == 0, "nothing of a refused answer is left");
		return;
	}
	check(receipt.error[0] == '\0', "a receipt has no error");
	check(receipt.accepted >= 0 && receipt.duplicates >= 0 && receipt.accepted + receipt.duplicates + receipt.nverdicts == n,
		  "the counts add up to the batch");
	for (int i = 0; i < receipt.nverdicts; i++)
	{
		const SmEventVerdict *verdict = &receipt.verdicts[i];

		check(verdict->event >= 0 && verdict->event < n && !seen[verdict->event], "each verdict is about an event of its own");
		seen[verdict->event] = true;
		check_text(verdict->detail);

		check(verdict->current == NULL || read_jsonb(verdict->current) != NULL, "what central holds can be stored");
	}
}

static void
check_problem(const char *body, size_t len)
{
	char	   *problem = sm_wire_problem(body, len, "application/problem+json; charset=utf-8");

	if (problem == NULL)
		return;
	check(problem[0] != '\0', "a problem says something");
	check_text(problem);
}

/* The first byte is the size of the batch, too. */
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
	check_receipt(body, len, data[0] % (MAX_EVENTS + 1));
	check_problem(body, len);
	MemoryContextSwitchTo(caller);
	MemoryContextReset(run_context);
	return 0;
}

/* receipt_fuzz(VARIADIC arguments of libFuzzer text[]) */
Datum
receipt_fuzz(PG_FUNCTION_ARGS)
{
	for (int i = 0; i < MAX_EVENTS; i++)
	{
		char		id[UUID_LEN] = {0x01, (char) 0x89, 0, 0, 0, 0, 0x70, 0, (char) 0x80, 0, 0, 0, 0, 0, 0, (char) i};

		memcpy(events[i].id.data, id, UUID_LEN);
	}
	run_fuzzer(PG_GETARG_ARRAYTYPE_P(0), run_one);
	PG_RETURN_NULL();
}
