/*
 * capture.c
 *		The capture trigger: a changed row becomes an event.
 *
 * softmobile.capture() is an AFTER ROW trigger, one function for all tables; it
 * runs in the selling transaction, as the selling role, and takes no lock beyond
 * those that eventlog.c names.  What it must know of a table is read from
 * softmobile.captured_table once per backend and table and kept until a relcache
 * invalidation of either.  Partitions and inheritance children are captured as
 * their nearest attached ancestor says, columns being found by name.
 *
 * An update that moves a row to another branch or changes its key is captured as
 * a delete of the old and an insert of the new: they are different entities in
 * perhaps different lanes.  Every other change is one event.
 *
 * As a trigger of type ORIGIN it does not fire where session_replication_role is
 * replica (logical replication's apply, pg_restore --disable-triggers): such
 * rows have been captured where they were born.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "capture.h"
#include "catalog/indexing.h"
#include "catalog/pg_inherits.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "commands/trigger.h"
#include "encode.h"
#include "eventlog.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "guc.h"
#include "miscadmin.h"
#include "reason.h"
#include "segment.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/fmgrprotos.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "compat.h"

PG_FUNCTION_INFO_V1(softmobile_capture);
PG_FUNCTION_INFO_V1(softmobile_refuse_truncate);
PG_FUNCTION_INFO_V1(softmobile_refuse_change);
PG_FUNCTION_INFO_V1(softmobile_captures_changed);
PG_FUNCTION_INFO_V1(softmobile_capture_existing);

/* What the trigger knows of a table. */
typedef struct Capture
{
	Oid			relid;			/* hash key: the table that the trigger fires on */
	bool		valid;
	bool		stale;			/* an invalidation arrived, also while filling */
	MemoryContext cxt;			/* all that is below */
	int			entity_no;
	SmPriority	priority;
	const bool *enabled;		/* the setting that switches this entity type */
	bool		require_reason;
	int			nkeys;
	AttrNumber *keys;
	int			nbranches;
	AttrNumber *branches;
	AttrNumber	reason;			/* 0: none, as for the two below */
	AttrNumber	folio;
	AttrNumber	amount;
	SmEncoder  *encoder;
} Capture;

static HTAB *captures = NULL;
static Oid	captured_table_relid = InvalidOid;

/* Memory of one trigger call. */
static MemoryContext row_cxt = NULL;

static void
forget_captures(Datum arg, Oid relid)
{
	HASH_SEQ_STATUS status;
	Capture    *capture;

	if (captures == NULL)
		return;
	if (OidIsValid(relid) && relid != captured_table_relid)
	{
		capture = hash_search(captures, &relid, HASH_FIND, NULL);
		if (capture != NULL)
			capture->stale = true;
		return;
	}
	hash_seq_init(&status, captures);
	while ((capture = hash_seq_search(&status)) != NULL)
		capture->stale = true;
}

void
sm_capture_init(void)
{
	CacheRegisterRelcacheCallback(forget_captures, (Datum) 0);
	sm_lanes_init();
	sm_eventlog_init();
}

bool
sm_capture_in_transaction(void)
{
	return sm_eventlog_in_transaction();
}

/* Parents of a table by pg_inherits: one for a partition, any number else. */
static List *
parents_of(Oid relid)
{
	Relation	inherits = table_open(InheritsRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	List	   *parents = NIL;

	ScanKeyInit(&key, Anum_pg_inherits_inhrelid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(relid));
	scan = systable_beginscan(inherits, InheritsRelidSeqnoIndexId, true, NULL, 1, &key);
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
		parents = lappend_oid(parents, ((Form_pg_inherits) GETSTRUCT(tuple))->inhparent);
	systable_endscan(scan);
	table_close(inherits, AccessShareLock);
	return parents;
}

/* A row of one of our small tables whose column equals an OID or integer; copied, or NULL. */
static HeapTuple
find_row(Relation rel, AttrNumber attnum, RegProcedure equal, Datum value)
{
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;

	ScanKeyInit(&key, attnum, BTEqualStrategyNumber, equal, value);
	scan = systable_beginscan(rel, InvalidOid, false, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
		tuple = heap_copytuple(tuple);
	systable_endscan(scan);
	return tuple;
}

/* captured_table's row for a table or its nearest attached ancestor, breadth first. */
static HeapTuple
find_captured(Relation captured_table, Oid relid)
{
	List	   *level = list_make1_oid(relid);

	while (level != NIL)
	{
		List	   *next = NIL;
		ListCell   *lc;

		foreach(lc, level)
		{
			HeapTuple	tuple = find_row(captured_table, 1, F_OIDEQ, ObjectIdGetDatum(lfirst_oid(lc)));

			if (HeapTupleIsValid(tuple))
				return tuple;
			next = list_concat_unique_oid(next, parents_of(lfirst_oid(lc)));
		}
		level = next;
	}
	return NULL;
}

static Datum
column(HeapTuple tuple, Relation rel, const char *name, bool *isnull)
{
	TupleDesc	desc = RelationGetDescr(rel);

	return heap_getattr(tuple, SPI_fnumber(desc, name), desc, isnull);
}

static AttrNumber
named_column(Relation table, const char *name)
{
	int			attnum = SPI_fnumber(RelationGetDescr(table), name);

	if (attnum <= 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_COLUMN),
				 errmsg("column \"%s\" of table \"%s\" is gone, but softmobile captures by it",
						name, RelationGetRelationName(table)),
				 errhint("Call softmobile.detach() and softmobile.attach() for the table.")));
	return attnum;
}

static AttrNumber
optional_column(Relation table, HeapTuple row, Relation captured_table, const char *which)
{
	bool		isnull;
	Datum		name = column(row, captured_table, which, &isnull);

	return isnull ? 0 : named_column(table, NameStr(*DatumGetName(name)));
}

static AttrNumber *
column_list(Relation table, HeapTuple row, Relation captured_table, const char *which, int *n)
{
	bool		isnull;
	Datum		array = column(row, captured_table, which, &isnull);
	Datum	   *names;
	AttrNumber *result;

	deconstruct_array(DatumGetArrayTypeP(array), NAMEOID, NAMEDATALEN, false, TYPALIGN_CHAR,
					  &names, NULL, n);
	result = palloc(sizeof(AttrNumber) * Max(*n, 1));
	for (int i = 0; i < *n; i++)
		result[i] = named_column(table, NameStr(*DatumGetName(names[i])));
	return result;
}

static const bool *
enabling_setting(HeapTuple entity, Relation entities)
{
	bool		isnull;
	Datum		flag = column(entity, entities, "flag", &isnull);
	char	   *name;

	if (isnull)
		return &sm_enable_hybrid_prep;
	name = TextDatumGetCString(flag);
	if (strcmp(name, "purchases_sales") == 0)
		return &sm_enable_purchases_sales;
	if (strcmp(name, "transfers") == 0)
		return &sm_enable_transfers;
	return &sm_enable_hybrid_prep;
}

/* True when the column's values can be counted as an amount. */
static bool
is_amount_type(Oid typid)
{
	switch (getBaseType(typid))
	{
		case INT2OID:
		case INT4OID:
		case INT8OID:
		case FLOAT4OID:
		case FLOAT8OID:
		case NUMERICOID:
			return true;
		default:
			return false;
	}
}

static void
fill_capture(Capture *capture, Relation table)
{
	Relation	captured_table = table_open(sm_lanes_relation("captured_table"), AccessShareLock);
	Relation	entities = table_open(sm_lanes_relation("outbox_entity"), AccessShareLock);
	MemoryContext caller = MemoryContextSwitchTo(capture->cxt);
	HeapTuple	row = find_captured(captured_table, RelationGetRelid(table));
	HeapTuple	entity;
	bool		isnull;

	captured_table_relid = RelationGetRelid(captured_table);
	if (row == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table \"%s\" is not attached to softmobile", RelationGetRelationName(table)),
				 errdetail("It has the capture trigger, but softmobile.captured_table does not know it."),
				 errhint("Call softmobile.attach() for it, or drop the trigger.")));

	capture->entity_no = DatumGetInt32(column(row, captured_table, "entity_no", &isnull));
	capture->require_reason = DatumGetBool(column(row, captured_table, "require_reason", &isnull));
	capture->keys = column_list(table, row, captured_table, "key_columns", &capture->nkeys);
	capture->branches = column_list(table, row, captured_table, "branch_columns", &capture->nbranches);
	capture->reason = optional_column(table, row, captured_table, "reason_column");
	capture->folio = optional_column(table, row, captured_table, "folio_column");
	capture->amount = optional_column(table, row, captured_table, "amount_column");
	if (capture->amount != 0 &&
		!is_amount_type(TupleDescAttr(RelationGetDescr(table), capture->amount - 1)->atttypid))
		capture->amount = 0;

	entity = find_row(entities, 1, F_INT4EQ, Int32GetDatum(capture->entity_no));
	if (entity == NULL)
		elog(ERROR, "outbox_entity has no row %d", capture->entity_no);
	capture->priority = sm_lanes_priority(TextDatumGetCString(column(entity, entities, "priority", &isnull)));
	capture->enabled = enabling_setting(entity, entities);
	capture->encoder = sm_encode_create(RelationGetDescr(table), capture->cxt);

	MemoryContextSwitchTo(caller);
	table_close(entities, AccessShareLock);
	table_close(captured_table, AccessShareLock);
}

/*
 * The description of a table.  An entry is marked valid only after it has been
 * filled without error, and stays in use for the call even when an invalidation
 * arrives meanwhile.
 */
static Capture *
find_capture(Relation table)
{
	Oid			relid = RelationGetRelid(table);
	Capture    *capture;
	bool		found;

	if (captures == NULL)
	{
		HASHCTL		ctl = {.keysize = sizeof(Oid), .entrysize = sizeof(Capture)};

		captures = hash_create("softmobile captured tables", 32, &ctl, HASH_ELEM | HASH_BLOBS);
	}
	capture = hash_search(captures, &relid, HASH_ENTER, &found);
	if (!found)
	{
		capture->valid = false;
		capture->stale = true;
		capture->cxt = NULL;
	}
	if (capture->valid && !capture->stale)
		return capture;

	capture->valid = false;
	if (capture->cxt == NULL)
		capture->cxt = AllocSetContextCreate(CacheMemoryContext, "softmobile captured table",
											 ALLOCSET_SMALL_SIZES);
	MemoryContextReset(capture->cxt);
	capture->stale = false;
	fill_capture(capture, table);
	capture->valid = true;
	return capture;
}

/*
 * The branch of a row: the first branch column that holds a usable id, else the
 * setting, else the name of the database, so that no sale fails for want of one.
 */
static char *
branch_of(Capture *capture, TupleTableSlot *slot)
{
	StringInfoData text;

	for (int i = 0; i < capture->nbranches; i++)
	{
		if (slot_attisnull(slot, capture->branches[i]))
			continue;
		initStringInfo(&text);
		sm_encode_text(capture->encoder, slot, capture->branches[i], &text);
		if (sm_guc_branch_problem(text.data) == NULL)
			return text.data;
	}
	if (sm_branch_id[0] != '\0')
		return sm_branch_id;
	return get_database_name(MyDatabaseId);
}

/* A single key column's text, or a JSON array of the values of several. */
static char *
entity_id_of(Capture *capture, TupleTableSlot *slot)
{
	StringInfoData text;

	initStringInfo(&text);
	if (capture->nkeys == 1)
	{
		if (!slot_attisnull(slot, capture->keys[0]))
			sm_encode_text(capture->encoder, slot, capture->keys[0], &text);
		return text.data;
	}
	for (int i = 0; i < capture->nkeys; i++)
	{
		appendStringInfoChar(&text, i == 0 ? '[' : ',');
		sm_encode_value(capture->encoder, slot, capture->keys[i], &text);
	}
	appendStringInfoChar(&text, ']');
	return text.data;
}

static char *
reason_of(Capture *capture, TupleTableSlot *slot, Relation table)
{
	StringInfoData row_reason;
	bool		has_row_reason = capture->reason != 0 && !slot_attisnull(slot, capture->reason);
	const char *problem;
	char	   *reason;

	if (has_row_reason)
	{
		initStringInfo(&row_reason);
		sm_encode_text(capture->encoder, slot, capture->reason, &row_reason);
	}
	reason = sm_reason_current(has_row_reason ? row_reason.data : NULL);
	problem = reason == NULL ? NULL : sm_reason_problem(reason);
	if (problem == NULL && (!capture->require_reason || (reason != NULL && sm_reason_suffices(reason))))
		return reason;
	if (problem != NULL && !capture->require_reason)
		return NULL;
	ereport(ERROR,
			(errcode(ERRCODE_CHECK_VIOLATION),
			 errmsg("X-Reason required: at least %d characters", SM_REASON_MIN_CHARS),
			 problem ? errdetail("%s", problem) :
			 errdetail("Table \"%s\" accepts a change only with its reason.", RelationGetRelationName(table)),
			 errhint("Call softmobile.set_reason('why the change is made') first, in the same transaction."),
			 errtable(table)));
	return NULL;
}

static Datum
amount_of(Capture *capture, TupleTableSlot *slot, bool *present)
{
	StringInfoData text;
	Oid			typid;
	bool		isnull;
	Datum		value;

	*present = capture->amount != 0 && !slot_attisnull(slot, capture->amount);
	if (!*present)
		return (Datum) 0;
	typid = getBaseType(TupleDescAttr(slot->tts_tupleDescriptor, capture->amount - 1)->atttypid);
	value = slot_getattr(slot, capture->amount, &isnull);
	if (typid == NUMERICOID)
		return value;
	initStringInfo(&text);
	sm_encode_text(capture->encoder, slot, capture->amount, &text);
	return DirectFunctionCall3(numeric_in, CStringGetDatum(text.data), ObjectIdGetDatum(InvalidOid),
							   Int32GetDatum(-1));
}

/*
 * Appends an event; new or old is NULL where the operation has none.
 */
static void
append_event(Capture *capture, char op, TupleTableSlot *new, TupleTableSlot *old,
			 const char *actor, const char *reason)
{
	TupleTableSlot *row = new ? new : old;
	SmNewEvent	event = {.op = op, .entity_no = capture->entity_no, .priority = capture->priority};
	StringInfoData payload;
	StringInfoData folio;

	event.actor = actor;
	event.reason = reason;
	event.branch = branch_of(capture, row);
	event.entity_id = entity_id_of(capture, row);
	if (capture->folio != 0 && !slot_attisnull(row, capture->folio))
	{
		initStringInfo(&folio);
		sm_encode_text(capture->encoder, row, capture->folio, &folio);
		event.folio = folio.data;
	}
	event.amount = amount_of(capture, row, &event.has_amount);

	initStringInfo(&payload);
	if (new)
	{
		appendStringInfoString(&payload, "{\"new\":");
		sm_encode_row(capture->encoder, new, &payload);
	}
	if (old)
	{
		appendStringInfoString(&payload, new ? ",\"old\":" : "{\"old\":");
		if (new)
			(void) sm_encode_changed(capture->encoder, old, new, &payload);
		else
			sm_encode_row(capture->encoder, old, &payload);
	}
	appendStringInfoChar(&payload, '}');
	event.payload = payload.data;
	event.payload_len = payload.len;
	if (op == 's')
		event.priority = SM_LOW;
	sm_eventlog_append(&event);
}

/* Appends the event of a change that this session's user makes now. */
static void
append_change(Capture *capture, Relation table, char op, TupleTableSlot *new, TupleTableSlot *old)
{
	char	   *actor = GetUserNameFromId(GetOuterUserId(), true);

	append_event(capture, op, new, old, actor ? actor : "",
				 reason_of(capture, new ? new : old, table));
}

static bool
same_entity(Capture *capture, TupleTableSlot *a, TupleTableSlot *b)
{
	return strcmp(branch_of(capture, a), branch_of(capture, b)) == 0 &&
		strcmp(entity_id_of(capture, a), entity_id_of(capture, b)) == 0;
}

static void
capture_change(TriggerData *trigger, Capture *capture)
{
	Relation	table = trigger->tg_relation;

	if (TRIGGER_FIRED_BY_INSERT(trigger->tg_event))
		append_change(capture, table, 'i', trigger->tg_trigslot, NULL);
	else if (TRIGGER_FIRED_BY_DELETE(trigger->tg_event))
		append_change(capture, table, 'd', NULL, trigger->tg_trigslot);
	else if (same_entity(capture, trigger->tg_trigslot, trigger->tg_newslot))
		append_change(capture, table, 'u', trigger->tg_newslot, trigger->tg_trigslot);
	else
	{
		append_change(capture, table, 'd', NULL, trigger->tg_trigslot);
		append_change(capture, table, 'i', trigger->tg_newslot, NULL);
	}
}

/* Switches to a memory context that lives for one row. */
static MemoryContext
enter_row_context(void)
{
	if (row_cxt == NULL)
		row_cxt = AllocSetContextCreate(TopMemoryContext, "softmobile row", ALLOCSET_DEFAULT_SIZES);
	MemoryContextReset(row_cxt);
	return MemoryContextSwitchTo(row_cxt);
}

/*
 * softmobile.capture() -> trigger
 *
 * Errors: 23514 where a reason is required and missing, too short or unusable;
 * 23503 where the branch is unknown and softmobile.unknown_branch is refuse.
 */
Datum
softmobile_capture(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;
	Capture    *capture;
	MemoryContext caller;
	int			nest;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_AFTER(trigger->tg_event) ||
		!TRIGGER_FIRED_FOR_ROW(trigger->tg_event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("softmobile.capture() must be fired AFTER, FOR EACH ROW"),
				 errhint("Let softmobile.attach() create the trigger.")));

	capture = find_capture(trigger->tg_relation);
	if (!*capture->enabled)
		return PointerGetDatum(NULL);

	caller = enter_row_context();
	nest = sm_encode_begin_settings(capture->encoder);
	capture_change(trigger, capture);
	sm_encode_end_settings(nest);
	MemoryContextSwitchTo(caller);
	return PointerGetDatum(NULL);
}

/*
 * softmobile.refuse_truncate() -> trigger
 *
 * TRUNCATE tells no trigger which rows it removes.
 */
Datum
softmobile_refuse_truncate(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("softmobile.refuse_truncate() must be called as a trigger")));
	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("cannot truncate table \"%s\": softmobile captures it",
					RelationGetRelationName(trigger->tg_relation)),
			 errdetail("The rows that TRUNCATE removes would not reach the central server."),
			 errhint("Use DELETE, or call softmobile.detach() for the table first."),
			 errtable(trigger->tg_relation)));
	return (Datum) 0;
}

/*
 * softmobile.refuse_change() -> trigger
 *
 * Keeps the log as it was written, from everybody: ENABLE ALWAYS.  Only the
 * recycling of a segment may empty it (segment.c).
 */
Datum
softmobile_refuse_change(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("softmobile.refuse_change() must be called as a trigger")));
	if (TRIGGER_FIRED_BY_TRUNCATE(trigger->tg_event) && sm_segment_recycling())
		return PointerGetDatum(NULL);
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("an outbox event, once written, cannot be changed or removed"),
			 errhint("Correct the row in its own table, with a reason: that becomes an event of its own.")));
	return (Datum) 0;
}

/*
 * softmobile.captures_changed() -> void
 *
 * Makes every backend read captured_table anew; for use in the transaction that
 * changed it.
 */
Datum
softmobile_captures_changed(PG_FUNCTION_ARGS)
{
	CacheInvalidateRelcacheByRelid(sm_lanes_relation("captured_table"));
	PG_RETURN_VOID();
}

/*
 * softmobile.capture_existing(regclass, bigint, bigint, text, text) -> bigint
 *
 * Queues the rows in a range of a table's blocks, as they are now, for
 * attach(initial => 'snapshot').  Called by the worker, a few blocks in each
 * transaction; returns how many events that made.
 */
Datum
softmobile_capture_existing(PG_FUNCTION_ARGS)
{
	Relation	table = table_open(PG_GETARG_OID(0), AccessShareLock);
	char	   *actor = text_to_cstring(PG_GETARG_TEXT_PP(3));
	char	   *reason = PG_ARGISNULL(4) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(4));
	Capture    *capture = find_capture(table);
	TupleTableSlot *slot = table_slot_create(table, NULL);
	TableScanDesc scan;
	ItemPointerData first;
	ItemPointerData last;
	int64		events = 0;
	int			nest = sm_encode_begin_settings(capture->encoder);

	ItemPointerSet(&first, (BlockNumber) PG_GETARG_INT64(1), FirstOffsetNumber);
	ItemPointerSet(&last, (BlockNumber) PG_GETARG_INT64(2) - 1, MaxOffsetNumber);
	scan = table_beginscan_tidrange(table, GetActiveSnapshot(), &first, &last);
	while (table_scan_getnextslot_tidrange(scan, ForwardScanDirection, slot))
	{
		MemoryContext caller = enter_row_context();

		append_event(capture, 's', slot, NULL, actor, reason);
		MemoryContextSwitchTo(caller);
		events++;
		CHECK_FOR_INTERRUPTS();
	}
	table_endscan(scan);
	sm_encode_end_settings(nest);
	ExecDropSingleTupleTableSlot(slot);
	table_close(table, NoLock);
	PG_RETURN_INT64(events);
}
