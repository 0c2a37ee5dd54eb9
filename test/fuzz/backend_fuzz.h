/*
 * backend_fuzz.h
 *		What the fuzzers that run inside a backend share: fenced memory, words to
 *		make inputs of, and the way into libFuzzer.
 *
 * They are modules for tests only.  run calls their one function in a single-user
 * backend, so that the code under test meets the server's own JSON, encodings,
 * memory contexts and errors, not stand-ins for them; it ends that process.  The
 * fuzzer and the code under test, which it includes, are instrumented, the server
 * is not, so memory that the code under test allocates is fenced here.
 *
 * The first byte of an input chooses how the rest is read: as it is, or (from 0x80
 * on) as words of which a body is made, since random bytes seldom get beyond the
 * JSON parser.
 */
#ifndef BACKEND_FUZZ_H
#define BACKEND_FUZZ_H

#include "postgres.h"

#include <sanitizer/asan_interface.h>

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/memutils.h"

extern int	LLVMFuzzerRunDriver(int *argc, char ***argv, int (*callback) (const uint8_t *data, size_t size));

static MemoryContext run_context;

#define FENCE		32

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

static inline void *
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

static void
check(bool holds, const char *what)
{
	if (holds)
		return;
	fprintf(stderr, "not so: %s\n", what);
	abort();
}

/* The body that an input stands for; not terminated. */
static char *
make_body(const uint8_t *data, size_t size, const char *const *words, int nwords, int *len)
{
	StringInfoData made;

	initStringInfo(&made);
	if (data[0] < 0x80)
		appendBinaryStringInfo(&made, (const char *) data + 1, (int) size - 1);
	else
		for (size_t i = 1; i < size; i++)
			appendStringInfoString(&made, words[data[i] % nwords]);
	*len = made.len;
	return memcpy(fenced_palloc(made.len), made.data, made.len);
}

/* Does not return.  arguments: of libFuzzer. */
static void
run_fuzzer(ArrayType *arguments, int (*run_one) (const uint8_t *data, size_t size))
{
	Datum	   *elements;
	int			nelements;
	int			argc = 1;
	char	  **argv;

	deconstruct_array(arguments, TEXTOID, -1, false, TYPALIGN_INT, &elements, NULL, &nelements);
	argv = palloc0((nelements + 2) * sizeof(char *));
	argv[0] = "fuzz";
	for (int i = 0; i < nelements; i++)
		argv[argc++] = TextDatumGetCString(elements[i]);
	run_context = AllocSetContextCreate(TopMemoryContext, "fuzz", ALLOCSET_DEFAULT_SIZES);
	(void) set_stack_base();	/* a single-user backend of PostgreSQL 15 does not watch its stack */
	exit(LLVMFuzzerRunDriver(&argc, &argv, run_one));
}

#endif							/* BACKEND_FUZZ_H */
