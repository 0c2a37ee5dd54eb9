/*
 * capture_floor.c
 *		The floor that capture is measured against: a C trigger that inserts an
 *		event of a given size past SPI and the executor, with core's row_to_json()
 *		and one index; it knows no lanes, reasons, branches or settings.
 *
 * Used by test/bench/capture only.
 */
#include "postgres.h"

#include <time.h>

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/indexing.h"
#include "catalog/namespace.h"
#include "commands/sequence.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(capture_floor);
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

/* cpu_ns() -> bigint: processor time that this backend has used. */
Datum
cpu_ns(PG_FUNCTION_ARGS)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	PG_RETURN_INT64((int64) t.tv_sec * 1000000000 + t.tv_nsec);
}
