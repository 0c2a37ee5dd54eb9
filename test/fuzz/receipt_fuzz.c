/*
 * receipt_fuzz.c
 *		A fuzzer for what central answers: receipts and problem documents.
 *
 * A module for tests only.  run calls its one function in a single-user backend,
 * so that the code under test (wire_answer.c, included below) meets the server's
 * own jsonb, encodings, memory contexts and errors, not stand-ins for them; it
 * ends that process.  The code under test and this file are instrumented, the
 * server is not, so memory that the code under test allocates is fenced here.
 *
 * The first byte of an input chooses the size of the batch and how the rest is
 * read: as a body, or as words of which one is made, since random bytes seldom
 * get beyond the JSON parser.
 */
#include "postgres.h"

#include <sanitizer/asan_interface.h>

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#define FENCE		32
#define MAX_EVENTS	4

/* A reset callback takes the fence down: the server may use the memory again. */
typedef struct Fence
{
	MemoryContextCallback callback;
	char	   *start;
} Fence;

static void
take_fence_down(void *arg)
{
	ASAN_UNPOISON_MEMORY_REGION(((Fence *) arg)->start, FENCE);
}

static void *
fenced_palloc(Size size)
{
	Fence	   *fence = palloc(sizeof(Fence));
	char	   *memory = palloc(size + FENCE);

	fence->start = memory + size;
	fence->callback.func = take_fence_down;
	fence->callback.arg = fence;
	ASAN_POISON_MEMORY_REGION(fence->start, FENCE);
	MemoryContextRegisterResetCallback(CurrentMemoryContext, &fence->callback);
	return memory;
}

static void *
fenced_palloc0(Size size)
{
	return memset(fenced_palloc(size), 0, size);
}

static char *
fenced_pnstrdup(const char *text, Size len)
{
	Size		used = strnlen(text, len);
	char	   *copy = memcpy(fenced_palloc(used + 1), text, used);

	copy[used] = '\0';
	return copy;
}

#define palloc fenced_palloc
#define palloc0 fenced_palloc0
#define pnstrdup fenced_pnstrdup
#include "wire_answer.c"
#undef palloc
#undef palloc0
#undef pnstrdup

PG_MODULE_MAGIC;
PG_FUNCTION_INFO_V1(receipt_fuzz);

extern int	LLVMFuzzerRunDriver(int *argc, char ***argv, int (*callback) (const uint8_t *data, size_t size));

static SmEvent events[MAX_EVENTS];
static MemoryContext run_context;

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

static void
check(bool holds, const char *what)
{
	if (holds)
		return;
	fprintf(stderr, "receipt_fuzz: not so: %s\n", what);
	abort();
}

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

static int
run_one(const uint8_t *data, size_t size)
{
	MemoryContext caller;
	StringInfoData made;
	char	   *body;
	int			n;

	if (size == 0)
		return 0;
	caller = MemoryContextSwitchTo(run_context);
	n = data[0] % (MAX_EVENTS + 1);
	initStringInfo(&made);
	if (data[0] < 0x80)
		appendBinaryStringInfo(&made, (const char *) data + 1, (int) size - 1);
	else
		for (size_t i = 1; i < size; i++)
			appendStringInfoString(&made, words[data[i] % lengthof(words)]);
	body = memcpy(fenced_palloc(made.len), made.data, made.len);
	check_receipt(body, made.len, n);
	check_problem(body, made.len);
	MemoryContextSwitchTo(caller);
	MemoryContextReset(run_context);
	return 0;
}

/* receipt_fuzz(VARIADIC arguments of libFuzzer text[]): does not return */
Datum
receipt_fuzz(PG_FUNCTION_ARGS)
{
	Datum	   *elements;
	int			nelements;
	int			argc = 1;
	char	  **argv;

	deconstruct_array(PG_GETARG_ARRAYTYPE_P(0), TEXTOID, -1, false, TYPALIGN_INT, &elements, NULL, &nelements);
	argv = palloc0((nelements + 2) * sizeof(char *));
	argv[0] = "receipt_fuzz";
	for (int i = 0; i < nelements; i++)
		argv[argc++] = TextDatumGetCString(elements[i]);

	run_context = AllocSetContextCreate(TopMemoryContext, "receipt_fuzz", ALLOCSET_DEFAULT_SIZES);
	for (int i = 0; i < MAX_EVENTS; i++)
	{
		char		id[UUID_LEN] = {0x01, (char) 0x89, 0, 0, 0, 0, 0x70, 0, (char) 0x80, 0, 0, 0, 0, 0, 0, (char) i};

		memcpy(events[i].id.data, id, UUID_LEN);
	}
	exit(LLVMFuzzerRunDriver(&argc, &argv, run_one));
}
