/*
 * capture.c
 *		The capture trigger: a changed row becomes an event.
 *
 * softmobile.capture() is an AFTER ROW trigger, one function for all tables; it
 * runs in the selling transaction, as the selling role, and takes no lock beyond
 * those that eventlog.c names.  What it must know of a table comes from
 * captured.c.
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

#include "access/heapam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "capture.h"
#include "captured.h"
#include "commands/dbcommands.h"
#include "commands/trigger.h"
#include "encode.h"
#include "eventlog.h"
#include "fmgr.h"
#include "guc.h"
#include "miscadmin.h"
#include "reason.h"
#include "segment.h"
#include "storage/lmgr.h"
#include "storage/bufmgr.h"
#include "storage/proc.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/hsearch.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "compat.h"

/* No amount of money reaches this. */
#define AMOUNT_LIMIT	"1e100"

PG_FUNCTION_INFO_V1(softmobile_capture);
PG_FUNCTION_INFO_V1(softmobile_refuse_truncate);
PG_FUNCTION_INFO_V1(softmobile_refuse_change);
PG_FUNCTION_INFO_V1(softmobile_capture_existing);

void
sm_capture_init(void)
{
	sm_captured_init();
	sm_lanes_init();
	sm_eventlog_init();
}

bool
sm_capture_in_transaction(void)
{
	return sm_eventlog_in_transaction();
}

/*
 * The branch of a row: the first branch column that holds a usable id, else the
 * setting, else the name of the database, so that no sale fails for want of one.
 * Blanks at its ends do not count, as in register_branch().
 */
static char *
branch_of(SmCaptured *captured, TupleTableSlot *slot)
{
	for (int i = 0; i < captured->nbranches; i++)
	{
		StringInfoData text;
		char	   *branch;

		if (slot_attisnull(slot, captured->branches[i]))
			continue;
		initStringInfo(&text);
		sm_encode_text(captured->encoder, slot, captured->branches[i], &text);
		while (text.len > 0 && text.data[text.len - 1] == ' ')
			text.data[--text.len] = '\0';
		branch = text.data + strspn(text.data, " ");
		if (sm_guc_branch_problem(branch) == NULL)
			return branch;
	}
	if (sm_branch_id[0] != '\0')
		return sm_branch_id;
	return get_database_name(MyDatabaseId);
}

/* A single key column's text, or a JSON array of the values of several. */
static char *
entity_id_of(SmCaptured *captured, TupleTableSlot *slot)
{
	StringInfoData text;

	initStringInfo(&text);
	if (captured->nkeys == 1)
	{
		if (!slot_attisnull(slot, captured->keys[0]))
			sm_encode_text(captured->encoder, slot, captured->keys[0], &text);
		return text.data;
	}
	for (int i = 0; i < captured->nkeys; i++)
	{
		appendStringInfoChar(&text, i == 0 ? '[' : ',');
		sm_encode_value(captured->encoder, slot, captured->keys[i], &text);
	}
	appendStringInfoChar(&text, ']');
	return text.data;
}

static char *
reason_of(SmCaptured *captured, TupleTableSlot *slot, Relation table)
{
	StringInfoData row_reason;
	bool		has_row_reason = captured->reason != 0 && !slot_attisnull(slot, captured->reason);
	const char *problem;
	char	   *reason;

	if (has_row_reason)
	{
		initStringInfo(&row_reason);
		sm_encode_text(captured->encoder, slot, captured->reason, &row_reason);
	}
	reason = sm_reason_current(has_row_reason ? row_reason.data : NULL);
	problem = reason == NULL ? NULL : sm_reason_problem(reason);
	if (problem == NULL && (!captured->require_reason || (reason != NULL && sm_reason_suffices(reason))))
		return reason;
	if (problem != NULL && !captured->require_reason)
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

/*
 * Whether an amount is one of money.  The sum of others, or one with them, need not
 * be a numeric: it would fail in whoever makes it, worker and views alike.
 */
static bool
is_countable(Datum amount)
{
	static Datum limit = (Datum) 0;
	static Datum negative_limit;

	if (limit == (Datum) 0)
	{
		MemoryContext caller = MemoryContextSwitchTo(TopMemoryContext);

		negative_limit = DirectFunctionCall3(numeric_in, CStringGetDatum("-" AMOUNT_LIMIT), ObjectIdGetDatum(InvalidOid),
											 Int32GetDatum(-1));
		limit = DirectFunctionCall3(numeric_in, CStringGetDatum(AMOUNT_LIMIT), ObjectIdGetDatum(InvalidOid),
									Int32GetDatum(-1));
		MemoryContextSwitchTo(caller);
	}
	/* NaN is above all. */
	return DatumGetBool(DirectFunctionCall2(numeric_lt, amount, limit)) &&
		DatumGetBool(DirectFunctionCall2(numeric_gt, amount, negative_limit));
}

static Datum
amount_of(SmCaptured *captured, TupleTableSlot *slot, bool *present)
{
	StringInfoData text;
	bool		isnull;
	Datum		amount;

	*present = captured->amount != 0 && !slot_attisnull(slot, captured->amount);
	if (!*present)
		return (Datum) 0;
	if (captured->amount_is_numeric)
		amount = slot_getattr(slot, captured->amount, &isnull);
	else
	{
		initStringInfo(&text);
		sm_encode_text(captured->encoder, slot, captured->amount, &text);
		amount = DirectFunctionCall3(numeric_in, CStringGetDatum(text.data), ObjectIdGetDatum(InvalidOid),
									 Int32GetDatum(-1));
	}
	*present = is_countable(amount);
	return amount;
}

/* The row that an event is about: the new one, of a delete the old one. */
static TupleTableSlot *
row_of(TupleTableSlot *new, TupleTableSlot *old)
{
	TupleTableSlot *row = new ? new : old;

	if (row == NULL)
		elog(ERROR, "a change without a row");
	return row;
}

/*
 * Appends an event; new or old is NULL where the operation has none.
 */
static void
append_event(SmCaptured *captured, char op, TupleTableSlot *new, TupleTableSlot *old,
			 const char *actor, const char *reason)
{
	TupleTableSlot *row = row_of(new, old);
	SmNewEvent	event = {.op = op, .entity_no = captured->entity_no, .priority = captured->priority};
	StringInfoData payload;
	StringInfoData folio;

	event.actor = actor;
	event.reason = reason;
	event.branch = branch_of(captured, row);
	event.entity_id = entity_id_of(captured, row);
	if (captured->folio != 0 && !slot_attisnull(row, captured->folio))
	{
		initStringInfo(&folio);
		sm_encode_text(captured->encoder, row, captured->folio, &folio);
		event.folio = folio.data;
	}
	event.amount = amount_of(captured, row, &event.has_amount);

	initStringInfo(&payload);
	payload.len = VARHDRSZ;
	if (new)
	{
		appendStringInfoString(&payload, "{\"new\":");
		sm_encode_row(captured->encoder, new, &payload);
	}
	if (old)
	{
		appendStringInfoString(&payload, new ? ",\"old\":" : "{\"old\":");
		if (new)
			(void) sm_encode_changed(captured->encoder, old, new, &payload);
		else
			sm_encode_row(captured->encoder, old, &payload);
	}
	appendStringInfoChar(&payload, '}');
	event.payload = &payload;
	if (op == 's')
		event.priority = SM_LOW;
	sm_eventlog_append(&event);
}

/* Appends the event of a change that this session's user makes now. */
static void
append_change(SmCaptured *captured, Relation table, char op, TupleTableSlot *new, TupleTableSlot *old)
{
	char	   *actor = GetUserNameFromId(GetOuterUserId(), true);

	append_event(captured, op, new, old, actor ? actor : "",
				 reason_of(captured, row_of(new, old), table));
}

static bool
same_columns(SmCaptured *captured, const AttrNumber *columns, int n, TupleTableSlot *a, TupleTableSlot *b)
{
	for (int i = 0; i < n; i++)
		if (!sm_encode_same(captured->encoder, a, b, columns[i]))
			return false;
	return true;
}

static bool
same_entity(SmCaptured *captured, TupleTableSlot *a, TupleTableSlot *b)
{
	if (same_columns(captured, captured->keys, captured->nkeys, a, b) &&
		same_columns(captured, captured->branches, captured->nbranches, a, b))
		return true;
	return strcmp(branch_of(captured, a), branch_of(captured, b)) == 0 &&
		strcmp(entity_id_of(captured, a), entity_id_of(captured, b)) == 0;
}

/* An update, or what it amounts to where it makes one entity another. */
static void
append_update(SmCaptured *captured, Relation table, TupleTableSlot *old, TupleTableSlot *new)
{
	if (same_entity(captured, old, new))
		append_change(captured, table, 'u', new, old);
	else
	{
		append_change(captured, table, 'd', NULL, old);
		append_change(captured, table, 'i', new, NULL);
	}
}

/*
 * Rows that a statement's own triggers change again
 *
 * Our trigger goes first for its row, but a statement's rows come one after the
 * other, and a trigger of the application that is fired for one of them may
 * change another whose event is still to come.  That change then stands in the
 * log before the one that made its old version.  So that the newest state stands
 * last, it is captured once more, after it.
 *
 * To know these cases: the old versions, made by this transaction, of what was
 * captured below another trigger.
 */

typedef struct Overtaker
{
	Oid			relid;
	ItemPointerData old;
} Overtaker;

static HTAB *overtakers = NULL;
static LocalTransactionId overtakers_lxid = InvalidLocalTransactionId;

static bool
is_overtaken(Relation table, ItemPointer version)
{
	Overtaker	key = {0};

	if (overtakers == NULL || overtakers_lxid != SM_MY_LXID)
		return false;
	key.relid = RelationGetRelid(table);
	key.old = *version;
	return hash_search(overtakers, &key, HASH_FIND, NULL) != NULL;
}

static void
note_overtaker(Relation table, HeapTuple old)
{
	Overtaker	key = {0};

	if (table->rd_tableam != GetHeapamTableAmRoutine() ||
		!TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(old->t_data)) ||
		DatumGetInt32(DirectFunctionCall1(pg_trigger_depth, (Datum) 0)) < 2)
		return;
	if (overtakers_lxid != SM_MY_LXID)
	{
		HASHCTL		ctl = {.keysize = sizeof(Overtaker), .entrysize = sizeof(Overtaker), .hcxt = TopTransactionContext};

		overtakers = hash_create("softmobile overtakers", 64, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
		overtakers_lxid = SM_MY_LXID;
	}
	key.relid = RelationGetRelid(table);
	key.old = old->t_self;
	(void) hash_search(overtakers, &key, HASH_ENTER, NULL);
}

/* Captures again what was captured before the version in slot. */
static void
repeat_overtakers(SmCaptured *captured, Relation table, HeapTuple tuple, TupleTableSlot *slot)
{
	HeapTuple	version = tuple;
	TupleTableSlot *newest;

	/* An entry whose subtransaction was rolled back has not superseded the version. */
	while (is_overtaken(table, &version->t_self) && (version->t_data->t_infomask & HEAP_XMAX_INVALID) == 0 &&
		   TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetUpdateXid(version->t_data)))
	{
		HeapTupleData next = {.t_self = version->t_data->t_ctid};
		Buffer		buffer;

		/* Moved to another partition: there it was captured as an insert. */
		if (HeapTupleHeaderIndicatesMovedPartitions(version->t_data))
			return;
		if (ItemPointerEquals(&next.t_self, &version->t_self))
		{
			append_change(captured, table, 'd', NULL, slot);
			return;
		}
		if (!heap_fetch(table, SnapshotAny, &next, &buffer, false))
			elog(ERROR, "newer version of a row of \"%s\" is missing", RelationGetRelationName(table));
		version = heap_copytuple(&next);
		ReleaseBuffer(buffer);
	}
	if (version == tuple)
		return;
	newest = MakeSingleTupleTableSlot(RelationGetDescr(table), &TTSOpsHeapTuple);
	ExecStoreHeapTuple(version, newest, false);
	append_update(captured, table, slot, newest);
	ExecDropSingleTupleTableSlot(newest);
}

static void
capture_change(TriggerData *trigger, SmCaptured *captured)
{
	Relation	table = trigger->tg_relation;

	if (TRIGGER_FIRED_BY_INSERT(trigger->tg_event))
	{
		append_change(captured, table, 'i', trigger->tg_trigslot, NULL);
		repeat_overtakers(captured, table, trigger->tg_trigtuple, trigger->tg_trigslot);
		return;
	}
	note_overtaker(table, trigger->tg_trigtuple);
	if (TRIGGER_FIRED_BY_DELETE(trigger->tg_event))
		append_change(captured, table, 'd', NULL, trigger->tg_trigslot);
	else
	{
		append_update(captured, table, trigger->tg_trigslot, trigger->tg_newslot);
		repeat_overtakers(captured, table, trigger->tg_newtuple, trigger->tg_newslot);
	}
}

/*
 * Switches to a new memory context, for one row.  Not one that is kept for the
 * next: a type's cast to json may be a function that changes captured tables.
 * (The allocator keeps deleted contexts of this size at hand.)
 */
static MemoryContext
enter_row_context(void)
{
	return MemoryContextSwitchTo(AllocSetContextCreate(CurrentMemoryContext, "softmobile row",
													   ALLOCSET_DEFAULT_SIZES));
}

static void
leave_row_context(MemoryContext caller)
{
	MemoryContext row_cxt = MemoryContextSwitchTo(caller);

	MemoryContextDelete(row_cxt);
}

/*
 * softmobile.capture() -> trigger
 *
 * An argument says that the table got the trigger because it has a parent.
 *
 * Errors: 23514 where a reason is required and missing, too short or unusable;
 * 23503 where the branch is unknown and softmobile.unknown_branch is refuse.
 */
Datum
softmobile_capture(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;
	SmCaptured *captured;
	MemoryContext caller;
	int			nest;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_AFTER(trigger->tg_event) ||
		!TRIGGER_FIRED_FOR_ROW(trigger->tg_event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("softmobile.capture() must be fired AFTER, FOR EACH ROW"),
				 errhint("Let softmobile.attach() create the trigger.")));

	captured = sm_captured_find(trigger->tg_relation);
	if (!captured->attached)
	{
		/* A former partition or child keeps the trigger that it got from its parent. */
		if (trigger->tg_trigger->tgnargs > 0)
			return PointerGetDatum(NULL);
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table \"%s\" is not attached to softmobile", RelationGetRelationName(trigger->tg_relation)),
				 errdetail("It has the capture trigger, but softmobile.captured_table does not know it."),
				 errhint("Call softmobile.attach() for it, or drop the trigger.")));
	}
	if (!*captured->enabled)
		return PointerGetDatum(NULL);

	caller = enter_row_context();
	nest = sm_encode_begin_settings(captured->encoder);
	capture_change(trigger, captured);
	sm_encode_end_settings(nest);
	leave_row_context(caller);
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
	if (!sm_captured_find(trigger->tg_relation)->attached)
		return PointerGetDatum(NULL);
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
 * softmobile.capture_existing(regclass, bigint, bigint, text, text) -> bigint
 *
 * Queues the rows in a range of a table's blocks, as they are now, for
 * attach(initial => 'snapshot').  Called by the worker, a few blocks in each
 * transaction; returns how many events that made.
 */
Datum
softmobile_capture_existing(PG_FUNCTION_ARGS)
{
	Relation	table;
	char	   *actor = text_to_cstring(PG_GETARG_TEXT_PP(3));
	char	   *reason = PG_ARGISNULL(4) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(4));
	SmCaptured *captured;
	TupleTableSlot *slot;
	TableScanDesc scan;
	ItemPointerData first;
	ItemPointerData last;
	int64		events = 0;
	int			nest;
	int			encode_nest;
	Oid			caller_id;
	int			caller_context;

	/* The worker has other things to do than to wait for somebody's DDL. */
	if (!ConditionalLockRelationOid(PG_GETARG_OID(0), AccessShareLock))
		PG_RETURN_NULL();
	table = table_open(PG_GETARG_OID(0), NoLock);
	captured = sm_captured_find(table);

	/* A partition that was detached meanwhile is captured no longer. */
	if (!captured->attached)
	{
		table_close(table, NoLock);
		PG_RETURN_INT64(0);
	}

	/*
	 * A column's type may have a cast to json, and that is code of the
	 * application's.  The settings that it changes are not to stay either: the
	 * worker's search_path, for one.
	 */
	GetUserIdAndSecContext(&caller_id, &caller_context);
	SetUserIdAndSecContext(table->rd_rel->relowner, caller_context | SECURITY_RESTRICTED_OPERATION);
	nest = NewGUCNestLevel();

	slot = table_slot_create(table, NULL);
	encode_nest = sm_encode_begin_settings(captured->encoder);
	ItemPointerSet(&first, (BlockNumber) PG_GETARG_INT64(1), FirstOffsetNumber);
	ItemPointerSet(&last, (BlockNumber) PG_GETARG_INT64(2) - 1, MaxOffsetNumber);
	scan = table_beginscan_tidrange(table, GetActiveSnapshot(), &first, &last);
	while (table_scan_getnextslot_tidrange(scan, ForwardScanDirection, slot))
	{
		MemoryContext caller = enter_row_context();

		append_event(captured, 's', slot, NULL, actor, reason);
		leave_row_context(caller);
		events++;
		CHECK_FOR_INTERRUPTS();
	}
	table_endscan(scan);
	sm_encode_end_settings(encode_nest);
	AtEOXact_GUC(false, nest);
	sm_eventlog_flush();
	ExecDropSingleTupleTableSlot(slot);
	SetUserIdAndSecContext(caller_id, caller_context);
	table_close(table, NoLock);
	PG_RETURN_INT64(events);
}
