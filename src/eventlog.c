/*
 * eventlog.c
 *		Appends events to the outbox, in the transaction whose change they tell.
 *
 * Called by capture for every row, so it goes past SPI and the executor: rows are
 * formed here and put into heap and indexes with the functions that COPY and the
 * system's own catalogs use.  The application's role needs no rights on the
 * outbox.  The only locks are RowExclusiveLock on the current segment, its
 * indexes and the lane's sequence; none makes one sale wait for another.
 *
 * The buffer
 *
 * The events of a transaction are gathered and written together: a segment's page
 * takes many rows under one lock and one WAL record, a lane's numbers are drawn
 * in one piece, the segment and its indexes are opened once.  The buffer is
 * flushed before the commit, or the PREPARE; when it is full, so that memory is
 * bounded; and before a query or a command that may look at the log, or do
 * something to it.  An event carries the command that made it where anybody could
 * still tell, so it is visible as if it had been written at once.
 *
 * The segment is locked from the first event on, written or not: whoever is about
 * to drop the extension waits for it, and counts it.
 *
 * Numbers are thus mostly drawn when the transaction commits.  One that is rolled
 * back, or stays open for hours, mostly has none, and leaves no gap.
 *
 * Subtransactions.  The buffer can hold events of several levels.  Those of an
 * outer one cannot be written while an inner one is open, as they would belong to
 * it: they keep their place, get their numbers if anything behind them is written,
 * and wait for the end of the subtransaction.  Events of a subtransaction that is
 * rolled back leave the buffer; those of one that is released become its
 * parent's.  Levels end from the inside, so the buffer is always ordered by level.
 * (What waits is not visible to a query within the subtransaction.  No other
 * visibility is lost.)
 *
 * Order matters: the transaction id first, then the number, then the row.  The
 * worker relies on it (gaps.c).  Numbers follow the order of the changes, since
 * the buffer does and since nobody else can change these entities before this
 * transaction is over.  Lane and segment are decided with the number, not
 * when the change is made: whatever changes them meanwhile counts.
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "compat.h"
#include "eventlog.h"
#include "executor/executor.h"
#include "guc.h"
#include "logindex.h"
#include "miscadmin.h"
#include "seqno.h"
#include "shmem.h"
#include "tcop/utility.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "uuid7.h"

/* Events and bytes of them that are gathered before they are written. */
#define MAX_EVENTS		64
#define MAX_BYTES		(64 * 1024)

/* Columns of softmobile.outbox_event, in order. */
enum EventColumn
{
	COL_SEQ,
	COL_CREATED_AT,
	COL_ID,
	COL_LANE_ID,
	COL_ENTITY_NO,
	COL_OP,
	COL_BRANCH_ID,
	COL_ENTITY_ID,
	COL_ACTOR,
	COL_REASON,
	COL_FOLIO,
	COL_AMOUNT,
	COL_PAYLOAD,
	EVENT_COLUMNS
};

/* The first of them, as they lie in a row: all of fixed width, none NULL. */
typedef struct FixedColumns
{
	int64		seq;
	TimestampTz created_at;
	pg_uuid_t	id;
	int32		lane_id;
	int32		entity_no;
	char		op;
} FixedColumns;

StaticAssertDecl(SM_EVENT_ID == COL_ID + 1, "the column of the id");

#define FIXED(event)	((FixedColumns *) GETSTRUCT((event)->row))

/* A lane by what rows say of it; which one that is, is looked up for each flush. */
typedef struct Target
{
	char		branch[SM_BRANCH_MAX + 1];
	SmPriority	priority;
	SmLaneRef	lane;
	bool		registered;
	int			wanted;			/* numbers for this flush */
	int64		next;			/* the first of them not given yet */
} Target;

typedef struct Event
{
	SubTransactionId subid;		/* whose fate it shares */
	CommandId	cid;			/* the command that made the change */
	int			target;
	HeapTuple	row;			/* lane and number come with a flush */
} Event;

/* What is not written yet.  Some of its memory stays for the next transaction. */
static struct
{
	MemoryContext cxt;			/* events and targets */
	MemoryContext row_cxt;		/* rows */
	int			n;
	int			numbered;		/* of these, at the front, have lane and number */
	int			room;
	Event	   *events;
	int			ntargets;
	int			target_room;
	Target	   *targets;
	Size		bytes;			/* of all rows */
}			buffer;

static bool appended = false;	/* in this transaction */
static bool poke_wanted = false;	/* at its commit, whether the worker hears events or not */

static ExecutorStart_hook_type prev_executor_start = NULL;
static ProcessUtility_hook_type prev_utility = NULL;

/* --- the buffer --- */

static void
create_buffer(void)
{
	buffer.cxt = AllocSetContextCreate(TopMemoryContext, "softmobile events", ALLOCSET_SMALL_SIZES);
	buffer.row_cxt = AllocSetContextCreate(buffer.cxt, "softmobile rows", ALLOCSET_DEFAULT_SIZES);
	buffer.room = 8;
	buffer.events = MemoryContextAlloc(buffer.cxt, buffer.room * sizeof(Event));
	buffer.target_room = 4;
	buffer.targets = MemoryContextAlloc(buffer.cxt, buffer.target_room * sizeof(Target));
}

/* Forgets the events from the n'th on. */
static void
truncate_buffer(int n)
{
	if (buffer.n == 0)
		return;
	if (n == 0)
	{
		MemoryContextReset(buffer.row_cxt);
		buffer.bytes = 0;
		buffer.ntargets = 0;
	}
	for (int i = n; n > 0 && i < buffer.n; i++)
	{
		buffer.bytes -= buffer.events[i].row->t_len;
		heap_freetuple(buffer.events[i].row);
	}
	buffer.n = n;
	buffer.numbered = Min(buffer.numbered, n);
}

static int
find_target(const char *branch, SmPriority priority)
{
	Target	   *target;

	for (int i = buffer.ntargets - 1; i >= 0; i--)
		if (buffer.targets[i].priority == priority && strcmp(buffer.targets[i].branch, branch) == 0)
			return i;
	if (buffer.ntargets == buffer.target_room)
	{
		buffer.target_room *= 2;
		buffer.targets = repalloc(buffer.targets, buffer.target_room * sizeof(Target));
	}
	target = &buffer.targets[buffer.ntargets];
	strlcpy(target->branch, branch, sizeof(target->branch));
	target->priority = priority;
	/* A branch that is refused is refused with its row, not with the commit. */
	if (sm_unknown_branch == SM_UNKNOWN_REFUSE)
		(void) sm_lanes_find(branch, priority, &target->registered);
	return buffer.ntargets++;
}

static void
set_text(Datum *values, bool *nulls, int col, const char *text)
{
	nulls[col] = text == NULL;
	if (text != NULL)
		values[col] = CStringGetTextDatum(text);
}

/* The row, but for its lane, its number, and its branch if the lane has none. */
static HeapTuple
form_row(const SmNewEvent *new)
{
	Datum		values[EVENT_COLUMNS];
	bool		nulls[EVENT_COLUMNS] = {0};
	TupleDesc	desc = sm_lanes_event_desc();
	TimestampTz now = GetCurrentTimestamp();
	pg_uuid_t	id;
	MemoryContext caller;
	HeapTuple	row;

	sm_uuid7_generate(now, &id);
	values[COL_SEQ] = Int64GetDatum(0);
	values[COL_CREATED_AT] = TimestampTzGetDatum(now);
	values[COL_ID] = UUIDPGetDatum(&id);
	values[COL_LANE_ID] = Int32GetDatum(0);
	values[COL_ENTITY_NO] = Int32GetDatum(new->entity_no);
	values[COL_OP] = CharGetDatum(new->op);
	nulls[COL_BRANCH_ID] = true;
	set_text(values, nulls, COL_ENTITY_ID, new->entity_id);
	set_text(values, nulls, COL_ACTOR, new->actor);
	set_text(values, nulls, COL_REASON, new->reason);
	set_text(values, nulls, COL_FOLIO, new->folio);
	nulls[COL_AMOUNT] = !new->has_amount;
	if (new->has_amount)
		values[COL_AMOUNT] = PointerGetDatum(PG_DETOAST_DATUM_PACKED(new->amount));
	SET_VARSIZE(new->payload->data, new->payload->len);
	values[COL_PAYLOAD] = PointerGetDatum(new->payload->data);

	Assert(desc->natts == EVENT_COLUMNS);
	caller = MemoryContextSwitchTo(buffer.row_cxt);
	row = heap_form_tuple(desc, values, nulls);
	MemoryContextSwitchTo(caller);
	return row;
}

void
sm_eventlog_append(const SmNewEvent *new)
{
	Event	   *event;

	if (buffer.cxt == NULL)
		create_buffer();
	if (buffer.n == buffer.room)
	{
		buffer.events = repalloc(buffer.events, 2 * buffer.room * sizeof(Event));
		buffer.room *= 2;
	}
	if (!appended)
		sm_lanes_lock_segment();
	event = &buffer.events[buffer.n];
	event->subid = GetCurrentSubTransactionId();
	event->cid = GetCurrentCommandId(true);
	event->target = find_target(new->branch, new->priority);
	event->row = form_row(new);
	buffer.bytes += event->row->t_len;
	buffer.n++;
	appended = true;

	if (buffer.n >= MAX_EVENTS || buffer.bytes >= MAX_BYTES)
		sm_eventlog_flush();
}

/* --- writing --- */

/* A lane without a branch: the row tells it, and the worker registers it. */
static void
tell_branch(Event *event, const char *branch)
{
	Datum		values[EVENT_COLUMNS];
	bool		nulls[EVENT_COLUMNS];
	bool		replaces[EVENT_COLUMNS] = {[COL_BRANCH_ID] = true};
	TupleDesc	desc = sm_lanes_event_desc();
	HeapTuple	row = event->row;
	MemoryContext caller;

	set_text(values, nulls, COL_BRANCH_ID, branch);
	caller = MemoryContextSwitchTo(buffer.row_cxt);
	event->row = heap_modify_tuple(row, desc, values, nulls, replaces);
	MemoryContextSwitchTo(caller);
	poke_wanted = true;
	buffer.bytes += event->row->t_len - row->t_len;
	heap_freetuple(row);
}

/* Gives all events of the buffer their lane and number, in order. */
static void
draw_numbers(void)
{
	for (int i = 0; i < buffer.ntargets; i++)
		buffer.targets[i].wanted = 0;
	for (int i = buffer.numbered; i < buffer.n; i++)
		buffer.targets[buffer.events[i].target].wanted++;
	for (int i = 0; i < buffer.ntargets; i++)
	{
		Target	   *target = &buffer.targets[i];

		if (target->wanted == 0)
			continue;
		target->lane = sm_lanes_find(target->branch, target->priority, &target->registered);
		target->next = sm_seqno_take(target->lane.seqrelid, target->wanted);
	}
	for (int i = buffer.numbered; i < buffer.n; i++)
	{
		Event	   *event = &buffer.events[i];
		Target	   *target = &buffer.targets[event->target];

		if (!target->registered)
			tell_branch(event, target->branch);
		FIXED(event)->seq = target->next++;
		FIXED(event)->lane_id = target->lane.lane_id;
	}
	buffer.numbered = buffer.n;
}

/* Writes events as the last one's command. */
static void
insert_rows(SmLogIndexes *indexes, const Event *events, TupleTableSlot **slots, int n)
{
	if (n == 1)
	{
		heap_insert(indexes->segment, events->row, events->cid, 0, NULL);
		slots[0]->tts_tid = events->row->t_self;
	}
	else
		heap_multi_insert(indexes->segment, slots, n, events[n - 1].cid, 0, NULL);
	sm_logindex_insert(indexes, slots, n);
}

/* last: no query of this transaction will look at them any more. */
static void
write_events(const Event *events, int n, bool last)
{
	Relation	segment = sm_lanes_open_segment();
	SmLogIndexes indexes;
	TupleDesc	desc;
	TupleTableSlot **slots = palloc(n * sizeof(TupleTableSlot *));

	sm_logindex_open(&indexes, segment);
	desc = sm_lanes_event_desc();
	for (int i = 0; i < n; i++)
	{
		/* Rows that were not the slot's own would be copied. */
		slots[i] = MakeTupleTableSlot(desc, &TTSOpsHeapTuple);
		ExecStoreHeapTuple(events[i].row, slots[i], true);
	}
	for (int i = 0; i < n;)
	{
		int			from = i;

		while (i < n && (last || events[i].cid == events[from].cid))
			i++;
		insert_rows(&indexes, &events[from], &slots[from], i - from);
	}
	sm_logindex_close(&indexes);
	table_close(segment, NoLock);
}

/* Writes what this level of subtransaction has in the buffer. */
static void
flush(bool last)
{
	SubTransactionId subid = GetCurrentSubTransactionId();
	int			first = buffer.n;
	MemoryContext flush_cxt;
	MemoryContext caller;
	bool		needs_snapshot;

	while (first > 0 && buffer.events[first - 1].subid == subid)
		first--;
	if (first == buffer.n)
		return;

	flush_cxt = AllocSetContextCreate(CurrentMemoryContext, "softmobile flush", ALLOCSET_DEFAULT_SIZES);
	caller = MemoryContextSwitchTo(flush_cxt);
	/* A long payload goes to the TOAST table, under a snapshot. */
	needs_snapshot = !ActiveSnapshotSet();
	if (needs_snapshot)
		PushActiveSnapshot(GetTransactionSnapshot());
	(void) GetCurrentTransactionId();
	draw_numbers();
	write_events(&buffer.events[first], buffer.n - first, last);
	if (needs_snapshot)
		PopActiveSnapshot();
	MemoryContextSwitchTo(caller);
	MemoryContextDelete(flush_cxt);
	truncate_buffer(first);
}

void
sm_eventlog_flush(void)
{
	flush(false);
}

/* --- when --- */

static void
start_executor(QueryDesc *query, int eflags)
{
	if (buffer.n > 0 && !IsInParallelMode() && sm_lanes_log_among(query->plannedstmt->relationOids))
		sm_eventlog_flush();
	if (prev_executor_start)
		prev_executor_start(query, eflags);
	else
		standard_ExecutorStart(query, eflags);
}

/* COPY reads a table without the executor; the others may take the log away, or make it another one. */
static bool
touches_log(const Node *command)
{
	return IsA(command, CopyStmt) || IsA(command, DropStmt) || IsA(command, DropOwnedStmt) ||
		IsA(command, AlterExtensionStmt);
}

static void
process_utility(PlannedStmt *pstmt, const char *query, bool read_only_tree, ProcessUtilityContext context,
				ParamListInfo params, QueryEnvironment *env, DestReceiver *dest, QueryCompletion *qc)
{
	if (buffer.n > 0 && touches_log(pstmt->utilityStmt))
		sm_eventlog_flush();
	if (prev_utility)
		prev_utility(pstmt, query, read_only_tree, context, params, env, dest, qc);
	else
		standard_ProcessUtility(pstmt, query, read_only_tree, context, params, env, dest, qc);
}

static void
at_transaction_end(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
			if (buffer.n > 0)
				flush(true);
			break;
		case XACT_EVENT_ABORT:
		case XACT_EVENT_PREPARE:
			poke_wanted = false;
			appended = false;
			truncate_buffer(0);
			break;
		default:
			break;
	}
}

static void
at_subtransaction_end(SubXactEvent event, SubTransactionId subid, SubTransactionId parent, void *arg)
{
	int			first = buffer.n;

	if (event != SUBXACT_EVENT_COMMIT_SUB && event != SUBXACT_EVENT_ABORT_SUB)
		return;
	while (first > 0 && buffer.events[first - 1].subid == subid)
		first--;
	if (event == SUBXACT_EVENT_ABORT_SUB)
		truncate_buffer(first);
	else
		for (int i = first; i < buffer.n; i++)
			buffer.events[i].subid = parent;
}

/*
 * Wakes the worker when it can see all of a commit: its invalidation messages
 * (branches and lanes), and that it holds the sequence no more.
 */
static void
at_release(ResourceReleasePhase phase, bool is_commit, bool is_top_level, void *arg)
{
	if (phase != RESOURCE_RELEASE_AFTER_LOCKS || !is_commit || !is_top_level)
		return;
	if (poke_wanted)
		sm_shmem_poke(MyDatabaseId);
	else if (appended)
		sm_shmem_poke_events(MyDatabaseId);
	poke_wanted = false;
	appended = false;
}

void
sm_eventlog_init(void)
{
	sm_logindex_init();
	RegisterXactCallback(at_transaction_end, NULL);
	RegisterSubXactCallback(at_subtransaction_end, NULL);
	RegisterResourceReleaseCallback(at_release, NULL);
	prev_executor_start = ExecutorStart_hook;
	ExecutorStart_hook = start_executor;
	prev_utility = ProcessUtility_hook;
	ProcessUtility_hook = process_utility;
}

bool
sm_eventlog_in_transaction(void)
{
	return appended;
}

void
sm_eventlog_poke_at_commit(void)
{
	poke_wanted = true;
}
