/*
 * query.h
 *		Prepared statements of the worker: see query.c.
 */
#ifndef SM_QUERY_H
#define SM_QUERY_H

#include "executor/spi.h"
#include "utils/uuid.h"

#define SM_QUERY_MAX_ARGS	16

/*
 * A statement with constant, schema-qualified text; prepared at its first use
 * and kept for the life of the process.  Statically allocated by its user.
 */
typedef struct SmQuery
{
	const char *sql;
	int			nargs;
	Oid			argtypes[SM_QUERY_MAX_ARGS];
	bool		writes;			/* a SELECT whose function writes */
	SPIPlanPtr	plan;
} SmQuery;

/* Arguments of one execution. */
typedef struct SmArgs
{
	int			n;
	Datum		value[SM_QUERY_MAX_ARGS];
	char		null[SM_QUERY_MAX_ARGS + 1];
} SmArgs;

extern void sm_args_int4(SmArgs *args, int32 value);
extern void sm_args_int8(SmArgs *args, int64 value);
extern void sm_args_bool(SmArgs *args, bool value);
extern void sm_args_text(SmArgs *args, const char *value);	/* NULL: null */
extern void sm_args_time(SmArgs *args, TimestampTz value);	/* 0: null */
extern void sm_args_uuid(SmArgs *args, const pg_uuid_t *value);	/* NULL: null */
extern void sm_args_datum(SmArgs *args, Datum value);

/* Runs it; returns the number of rows, which are in SPI_tuptable. */
extern uint64 sm_query_run(SmQuery *query, SmArgs *args);

/* Opens a cursor for it, planned for the first rows to come soon. */
extern Portal sm_query_open(SmQuery *query, SmArgs *args);

/* Values of SPI_tuptable's row; text and copies in CurrentMemoryContext. */
extern bool sm_row_null(uint64 row, int col);
extern int32 sm_row_int4(uint64 row, int col);
extern int64 sm_row_int8(uint64 row, int col);
extern bool sm_row_bool(uint64 row, int col);
extern char *sm_row_text(uint64 row, int col);	/* any type, as text; NULL for null */
extern TimestampTz sm_row_time(uint64 row, int col);	/* 0 for null */
extern Datum sm_row_datum(uint64 row, int col);

#endif							/* SM_QUERY_H */
