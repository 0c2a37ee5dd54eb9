/*
 * encode_test.c
 *		SQL functions that call the encoder, for test/t/010_encode.pl.
 *
 * Each declared by the test with CREATE FUNCTION ... AS '<path>/encode_test'.
 * An encoder lives as long as the calling query (in fn_extra), like the capture
 * trigger's lives as long as the relcache entry.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "executor/tuptable.h"
#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/typcache.h"

#include "encode.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(encode_trigger);
PG_FUNCTION_INFO_V1(encode_changed_trigger);
PG_FUNCTION_INFO_V1(encode_row);
PG_FUNCTION_INFO_V1(encode_changed);
PG_FUNCTION_INFO_V1(encode_column);
PG_FUNCTION_INFO_V1(encode_growth);

static SmEncoder *
get_encoder(FunctionCallInfo fcinfo, TupleDesc desc)
{
	if (fcinfo->flinfo->fn_extra == NULL)
		fcinfo->flinfo->fn_extra = sm_encode_create(desc, fcinfo->flinfo->fn_mcxt);
	return fcinfo->flinfo->fn_extra;
}

/* The record argument n as a slot of its row type. */
static TupleTableSlot *
get_record(FunctionCallInfo fcinfo, int n)
{
	HeapTupleHeader header = PG_GETARG_HEAPTUPLEHEADER(n);
	TupleDesc	desc = lookup_rowtype_tupdesc_copy(HeapTupleHeaderGetTypeId(header),
												   HeapTupleHeaderGetTypMod(header));
	TupleTableSlot *slot = MakeSingleTupleTableSlot(desc, &TTSOpsHeapTuple);
	HeapTuple	tuple = palloc0(sizeof(HeapTupleData));

	tuple->t_len = HeapTupleHeaderGetDatumLength(header);
	ItemPointerSetInvalid(&tuple->t_self);
	tuple->t_data = header;
	ExecStoreHeapTuple(tuple, slot, false);
	return slot;
}

static text *
to_text(StringInfo str)
{
	return cstring_to_text_with_len(str->data, str->len);
}

/*
 * Row trigger: inserts (table, operation, new row, old values, how many) into the
 * table encoded, found by search_path.
 */
Datum
encode_trigger(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	Relation	rel = trigdata->tg_relation;
	SmEncoder  *enc = get_encoder(fcinfo, RelationGetDescr(rel));
	StringInfoData newjson;
	StringInfoData oldjson;
	Oid			types[] = {OIDOID, TEXTOID, TEXTOID, TEXTOID, INT4OID};
	Datum		values[5];
	char		nulls[] = "     ";
	int			changed = 0;
	int			nest = sm_encode_begin_settings(enc);

	initStringInfo(&newjson);
	initStringInfo(&oldjson);
	values[0] = ObjectIdGetDatum(RelationGetRelid(rel));

	if (TRIGGER_FIRED_BY_UPDATE(trigdata->tg_event))
	{
		values[1] = CStringGetTextDatum("UPDATE");
		sm_encode_row(enc, trigdata->tg_newslot, &newjson);
		changed = sm_encode_changed(enc, trigdata->tg_trigslot, trigdata->tg_newslot,
									&oldjson);
	}
	else if (TRIGGER_FIRED_BY_INSERT(trigdata->tg_event))
	{
		values[1] = CStringGetTextDatum("INSERT");
		sm_encode_row(enc, trigdata->tg_trigslot, &newjson);
		nulls[3] = 'n';
	}
	else
	{
		values[1] = CStringGetTextDatum("DELETE");
		sm_encode_row(enc, trigdata->tg_trigslot, &oldjson);
		nulls[2] = 'n';
	}
	sm_encode_end_settings(nest);
	values[2] = PointerGetDatum(to_text(&newjson));
	values[3] = PointerGetDatum(to_text(&oldjson));
	values[4] = Int32GetDatum(changed);

	SPI_connect();
	if (SPI_execute_with_args("INSERT INTO encoded (rel, op, new, old, changed)"
							  " VALUES ($1, $2, $3, $4, $5)",
							  5, types, values, nulls, false, 0) != SPI_OK_INSERT)
		elog(ERROR, "could not insert into encoded");
	SPI_finish();

	return PointerGetDatum(NULL);
}

/* Row trigger: only compares, and tells how many columns changed. */
Datum
encode_changed_trigger(PG_FUNCTION_ARGS)
{
	TriggerData *trigdata = (TriggerData *) fcinfo->context;
	SmEncoder  *enc = get_encoder(fcinfo, RelationGetDescr(trigdata->tg_relation));
	StringInfoData out;

	initStringInfo(&out);
	elog(NOTICE, "changed %d",
		 sm_encode_changed(enc, trigdata->tg_trigslot, trigdata->tg_newslot, &out));
	return PointerGetDatum(NULL);
}

/* encode_row(record) -> text */
Datum
encode_row(PG_FUNCTION_ARGS)
{
	TupleTableSlot *slot = get_record(fcinfo, 0);
	SmEncoder  *enc = get_encoder(fcinfo, slot->tts_tupleDescriptor);
	StringInfoData out;
	int			nest = sm_encode_begin_settings(enc);

	initStringInfo(&out);
	sm_encode_row(enc, slot, &out);
	sm_encode_end_settings(nest);
	PG_RETURN_TEXT_P(to_text(&out));
}

/* encode_changed(old record, new record) -> text */
Datum
encode_changed(PG_FUNCTION_ARGS)
{
	TupleTableSlot *oldslot = get_record(fcinfo, 0);
	TupleTableSlot *newslot = get_record(fcinfo, 1);
	StringInfoData out;

	initStringInfo(&out);
	(void) sm_encode_changed(get_encoder(fcinfo, oldslot->tts_tupleDescriptor), oldslot,
							 newslot, &out);
	PG_RETURN_TEXT_P(to_text(&out));
}

/*
 * encode_column(record, attnum, as json) -> text; the SQL null when the encoder
 * says that the column is null.
 */
Datum
encode_column(PG_FUNCTION_ARGS)
{
	TupleTableSlot *slot = get_record(fcinfo, 0);
	SmEncoder  *enc = get_encoder(fcinfo, slot->tts_tupleDescriptor);
	AttrNumber	attnum = PG_GETARG_INT16(1);
	StringInfoData out;
	bool		notnull;
	int			nest = sm_encode_begin_settings(enc);

	initStringInfo(&out);
	if (PG_GETARG_BOOL(2))
		notnull = sm_encode_value(enc, slot, attnum, &out);
	else
		notnull = sm_encode_text(enc, slot, attnum, &out);
	sm_encode_end_settings(nest);

	if (!notnull)
	{
		if (strcmp(out.data, PG_GETARG_BOOL(2) ? "null" : "") != 0)
			elog(ERROR, "unexpected output for a null: \"%s\"", out.data);
		PG_RETURN_NULL();
	}
	PG_RETURN_TEXT_P(to_text(&out));
}

/*
 * encode_growth(record, n) -> bytes that n more rows add to the encoder's context,
 * after a first row that may fill its caches.
 */
Datum
encode_growth(PG_FUNCTION_ARGS)
{
	TupleTableSlot *slot = get_record(fcinfo, 0);
	int			n = PG_GETARG_INT32(1);
	MemoryContext owner = AllocSetContextCreate(CurrentMemoryContext, "encoder",
												ALLOCSET_SMALL_SIZES);
	MemoryContext tuple = AllocSetContextCreate(CurrentMemoryContext, "tuple",
												ALLOCSET_DEFAULT_SIZES);
	SmEncoder  *enc = sm_encode_create(slot->tts_tupleDescriptor, owner);
	Size		before = 0;

	for (int i = 0; i <= n; i++)
	{
		MemoryContext old = MemoryContextSwitchTo(tuple);
		int			nest = sm_encode_begin_settings(enc);
		StringInfoData out;

		initStringInfo(&out);
		sm_encode_row(enc, slot, &out);
		(void) sm_encode_changed(enc, slot, slot, &out);
		sm_encode_end_settings(nest);
		MemoryContextSwitchTo(old);
		MemoryContextReset(tuple);
		if (i == 0)
			before = MemoryContextMemAllocated(owner, true);
	}
	PG_RETURN_INT64(MemoryContextMemAllocated(owner, true) - before);
}
