/*
 * query.c
 *		Prepared statements of the worker.
 *
 * Called by outbox*.c only, between sm_outbox_begin() and its commit: there is an
 * SPI connection and an active snapshot, and every statement of a pass that only
 * reads sees this snapshot.
 */
#include "postgres.h"

#include "query.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

static void
add_arg(SmArgs *args, Datum value, bool null)
{
	Assert(args->n < SM_QUERY_MAX_ARGS);
	args->value[args->n] = value;
	args->null[args->n] = null ? 'n' : ' ';
	args->n++;
}

void
sm_args_int4(SmArgs *args, int32 value)
{
	add_arg(args, Int32GetDatum(value), false);
}

void
sm_args_int8(SmArgs *args, int64 value)
{
	add_arg(args, Int64GetDatum(value), false);
}

void
sm_args_bool(SmArgs *args, bool value)
{
	add_arg(args, BoolGetDatum(value), false);
}

void
sm_args_text(SmArgs *args, const char *value)
{
	add_arg(args, value ? CStringGetTextDatum(value) : (Datum) 0, value == NULL);
}

void
sm_args_time(SmArgs *args, TimestampTz value)
{
	add_arg(args, TimestampTzGetDatum(value), value == 0);
}

void
sm_args_uuid(SmArgs *args, const pg_uuid_t *value)
{
	add_arg(args, UUIDPGetDatum(value), value == NULL);
}

void
sm_args_datum(SmArgs *args, Datum value)
{
	add_arg(args, value, false);
}

static void
prepare_query(SmQuery *query, int options)
{
	if (query->plan != NULL)
		return;
	query->plan = SPI_prepare_cursor(query->sql, query->nargs, query->argtypes, options);
	if (query->plan == NULL)
		elog(ERROR, "could not prepare \"%s\": %s", query->sql, SPI_result_code_string(SPI_result));
	SPI_keepplan(query->plan);
}

/*
 * A statement that only reads is run read-only, under the pass's snapshot; one
 * that writes needs a newer snapshot to see what the pass has written itself.
 */
static bool
only_reads(const SmQuery *query)
{
	return !query->writes && strncmp(query->sql, "SELECT ", 7) == 0;
}

uint64
sm_query_run(SmQuery *query, SmArgs *args)
{
	MemoryContext caller = CurrentMemoryContext;
	int			result;

	Assert((args ? args->n : 0) == query->nargs);
	prepare_query(query, 0);
	result = SPI_execute_plan(query->plan, args ? args->value : NULL, args ? args->null : NULL,
							  only_reads(query), 0);
	MemoryContextSwitchTo(caller);	/* SPI leaves its own behind */
	if (result < 0)
		elog(ERROR, "could not run \"%s\": %s", query->sql, SPI_result_code_string(result));
	return SPI_processed;
}

Portal
sm_query_open(SmQuery *query, SmArgs *args)
{
	MemoryContext caller = CurrentMemoryContext;
	Portal		portal;

	prepare_query(query, CURSOR_OPT_FAST_PLAN | CURSOR_OPT_NO_SCROLL);
	portal = SPI_cursor_open(NULL, query->plan, args->value, args->null, true);
	MemoryContextSwitchTo(caller);
	return portal;
}

Datum
sm_row_datum(uint64 row, int col)
{
	bool		isnull;

	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, col, &isnull);
}

bool
sm_row_null(uint64 row, int col)
{
	bool		isnull;

	(void) SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, col, &isnull);
	return isnull;
}

int32
sm_row_int4(uint64 row, int col)
{
	return DatumGetInt32(sm_row_datum(row, col));
}

int64
sm_row_int8(uint64 row, int col)
{
	return DatumGetInt64(sm_row_datum(row, col));
}

bool
sm_row_bool(uint64 row, int col)
{
	return DatumGetBool(sm_row_datum(row, col));
}

char *
sm_row_text(uint64 row, int col)
{
	return SPI_getvalue(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, col);
}

TimestampTz
sm_row_time(uint64 row, int col)
{
	return sm_row_null(row, col) ? 0 : DatumGetTimestampTz(sm_row_datum(row, col));
}
