/*
 * capture_floor.c
 *		What capture is measured against: two C triggers that insert an event of a
 *		given size past SPI and the executor, with one index; they know no lanes,
 *		reasons, branches or settings.
 *
 * capture_floor() writes each event as its row is changed, with core's
 * row_to_json().  capture_bound() gathers the events of a statement and writes
 * them together, but encodes nothing: what is left is the queue of triggers,
 * forming rows, and putting them into heap and index.  So it shows what no
 * trigger that leaves events of this size can go below.
 *
 * Used by test/bench/capture only.
 */
#include "postgres.h"

#include <time.h>

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/indexing.h"
#include "commands/sequence.h"
#include "commands/trigger.h"
#include "executor/executor.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

PG_MODULE_MAGIC;

void		_PG_init(void);

#define BOUND_ROWS	64

PG_FUNCTION_INFO_V1(capture_floor);
PG_FUNCTION_INFO_V1(capture_bound);
PG_FUNCTION_INFO_V1(cpu_ns);

/*
 * capture_floor(table, sequence, width) -> trigger
 *
 * Inserts (nextval, now, row as JSON filled up with blanks to width bytes).
 */
Datum
capture_floor(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;
	char	  **args = trigger->tg_trigger->tgargs;
	int			width = pg_strtoint32(args[2]);
	bool		update = TRIGGER_FIRED_BY_UPDATE(trigger->tg_event);
	HeapTuple	row = update ? trigger->tg_newtuple : trigger->tg_trigtuple;
	Relation	log = table_open(atooid(args[0]), RowExclusiveLock);
	bool		nulls[3] = {false};
	Datum		values[3];
	text	   *json;
	text	   *payload;
	HeapTuple	tuple;

	json = DatumGetTextPP(DirectFunctionCall1(row_to_json,
											  heap_copy_tuple_as_datum(row, RelationGetDescr(trigger->tg_relation))));
	width = Max(width, VARSIZE_ANY_EXHDR(json));
	payload = palloc(VARHDRSZ + width);
	SET_VARSIZE(payload, VARHDRSZ + width);
	memset(VARDATA(payload), ' ', width);
	memcpy(VARDATA(payload), VARDATA_ANY(json), VARSIZE_ANY_EXHDR(json));

	values[0] = Int64GetDatum(nextval_internal(atooid(args[1]), false));
	values[1] = TimestampTzGetDatum(GetCurrentTimestamp());
	values[2] = PointerGetDatum(payload);
	tuple = heap_form_tuple(RelationGetDescr(log), values, nulls);
	CatalogTupleInsert(log, tuple);
	table_close(log, NoLock);
	return PointerGetDatum(NULL);
}

/* What capture_bound() has gathered; all of one statement and table. */
static HeapTuple gathered[BOUND_ROWS];
static int	ngathered = 0;
static Oid	bound_log = InvalidOid;
static MemoryContext bound_cxt = NULL;
static ExecutorFinish_hook_type prev_executor_finish = NULL;

static void
write_gathered(void)
{
	MemoryContext caller = MemoryContextSwitchTo(bound_cxt);
	Relation	log = table_open(bound_log, RowExclusiveLock);
	CatalogIndexState indexes = CatalogOpenIndexes(log);
	TupleTableSlot *slots[BOUND_ROWS];

	for (int i = 0; i < ngathered; i++)
	{
		slots[i] = MakeSingleTupleTableSlot(RelationGetDescr(log), &TTSOpsHeapTuple);
		ExecStoreHeapTuple(gathered[i], slots[i], true);
	}
	CatalogTuplesMultiInsertWithInfo(log, slots, ngathered, indexes);
	for (int i = 0; i < ngathered; i++)
		ExecDropSingleTupleTableSlot(slots[i]);
	CatalogCloseIndexes(indexes);
	table_close(log, NoLock);
	ngathered = 0;
	MemoryContextSwitchTo(caller);
	MemoryContextReset(bound_cxt);
}

static void
finish_executor(QueryDesc *query)
{
	if (prev_executor_finish)
		prev_executor_finish(query);
	else
		standard_ExecutorFinish(query);
	if (ngathered > 0)
		write_gathered();
}

/*
 * capture_bound(table, sequence, width) -> trigger
 *
 * Inserts (number, now, width blanks).  The number is not drawn from a sequence:
 * one session at a time is all that this is made for.
 */
Datum
capture_bound(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;
	char	  **args = trigger->tg_trigger->tgargs;
	int			width = pg_strtoint32(args[2]);
	static int64 number = 0;
	static TupleDesc desc = NULL;
	bool		nulls[3] = {false};
	Datum		values[3];
	text	   *payload = palloc(VARHDRSZ + width);
	MemoryContext caller;

	if (desc == NULL)
	{
		Relation	log = table_open(bound_log = atooid(args[0]), RowExclusiveLock);

		caller = MemoryContextSwitchTo(TopMemoryContext);
		desc = CreateTupleDescCopy(RelationGetDescr(log));
		MemoryContextSwitchTo(caller);
		table_close(log, NoLock);
		bound_cxt = AllocSetContextCreate(TopMemoryContext, "capture_bound", ALLOCSET_DEFAULT_SIZES);
		number = GetCurrentTimestamp();
	}
	SET_VARSIZE(payload, VARHDRSZ + width);
	memset(VARDATA(payload), ' ', width);
	values[0] = Int64GetDatum(++number);
	values[1] = TimestampTzGetDatum(GetCurrentTimestamp());
	values[2] = PointerGetDatum(payload);
	caller = MemoryContextSwitchTo(bound_cxt);
	gathered[ngathered++] = heap_form_tuple(desc, values, nulls);
	MemoryContextSwitchTo(caller);
	pfree(payload);
	if (ngathered == BOUND_ROWS)
		write_gathered();
	return PointerGetDatum(NULL);
}

void
_PG_init(void)
{
	prev_executor_finish = ExecutorFinish_hook;
	ExecutorFinish_hook = finish_executor;
}

/* cpu_ns() -> bigint: processor time that this backend has used. */
Datum
cpu_ns(PG_FUNCTION_ARGS)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	PG_RETURN_INT64((int64) t.tv_sec * 1000000000 + t.tv_nsec);
}
