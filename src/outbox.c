/*
 * outbox.c
 *		The worker's SQL on lanes, log and ledger.
 *
 * Called by the worker alone, which is the only writer of these tables.  Every
 * transaction is short and none is open while a socket waits.  Each begins with
 * sm_outbox_begin(): extension still there (and locked against being dropped
 * until the end), one snapshot for all that is read.  Commits are asynchronous:
 * what is lost in a crash is sent again and deduplicated by central.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "catalog/namespace.h"
#include "compat.h"
#include "outbox.h"
#include "pgstat.h"
#include "process.h"
#include "query.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/multirangetypes.h"
#include "utils/rangetypes.h"
#include "utils/snapmgr.h"
#include "utils/typcache.h"

/* Rows of the log taken from a cursor at a time; long payloads come by reference. */
#define FETCH_ROWS		256

/* Numbers between two ranges up to which they are read in one go. */
#define HOLE_MAX		64

/* What is read in a transaction lies in the context that it was begun in. */
static MemoryContext pass_cxt = NULL;

/* Entity types, as this transaction sees them; NULL: not read yet. */
typedef struct EntityType
{
	int			entity_no;
	char	   *name;
} EntityType;

static EntityType *entity_types = NULL;
static int	n_entity_types = 0;

static bool lanes_changed = true;
static Oid	lane_relid = InvalidOid;

static void
note_lane_change(Datum arg, Oid relid)
{
	if (relid == InvalidOid || relid == lane_relid)
		lanes_changed = true;
}

void
sm_outbox_init(void)
{
	CacheRegisterRelcacheCallback(note_lane_change, (Datum) 0);
}

bool
sm_outbox_begin(Oid extension)
{
	pass_cxt = CurrentMemoryContext;
	entity_types = NULL;
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	if (!sm_process_extension_stands(extension))
	{
		AbortCurrentTransaction();
		MemoryContextSwitchTo(pass_cxt);
		return false;
	}
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "could not connect to SPI");
	PushActiveSnapshot(GetTransactionSnapshot());
	sm_gaps_new_snapshot();
	if (!OidIsValid(lane_relid))
		lane_relid = sm_lanes_relation("outbox_lane");
	MemoryContextSwitchTo(pass_cxt);
	return true;
}

void
sm_outbox_commit(void)
{
	SPI_finish();
	PopActiveSnapshot();
	CommitTransactionCommand();
	MemoryContextSwitchTo(pass_cxt);
	pgstat_report_stat(true);
}

void
sm_outbox_commit_durably(void)
{
	ForceSyncCommit();
	sm_outbox_commit();
}

/* Makes the next sm_outbox_lanes_changed() true. */
void
sm_outbox_lanes_stale(void)
{
	lanes_changed = true;
}

/* Whether branches or lanes have changed since the last call. */
bool
sm_outbox_lanes_changed(void)
{
	bool		changed = lanes_changed;

	lanes_changed = false;
	return changed;
}

/* The multirange in a column as a set. */
SmRanges
sm_outbox_row_ranges(uint64 row, int col)
{
	SmRanges	set = {0};
	MultirangeType *multirange;
	TypeCacheEntry *typcache;

	if (sm_row_null(row, col))
		return set;
	multirange = DatumGetMultirangeTypeP(sm_row_datum(row, col));
	typcache = lookup_type_cache(MultirangeTypeGetOid(multirange), TYPECACHE_MULTIRANGE_INFO);
	for (int i = 0; i < multirange->rangeCount; i++)
	{
		RangeBound	lower;
		RangeBound	upper;

		multirange_get_bounds(typcache->rngtype, multirange, i, &lower, &upper);
		sm_ranges_append(&set, lower.infinite ? PG_INT64_MIN : DatumGetInt64(lower.val),
						 upper.infinite ? PG_INT64_MAX : DatumGetInt64(upper.val));
	}
	return set;
}

List *
sm_outbox_branches(void)
{
	static SmQuery query = {
		"SELECT branch_id, central_url, active, receipts = 'required' FROM softmobile.branch ORDER BY branch_id"
	};
	uint64		n = sm_query_run(&query, NULL);
	List	   *rows = NIL;

	for (uint64 i = 0; i < n; i++)
	{
		SmBranchRow *row = palloc0(sizeof(SmBranchRow));

		row->branch = sm_row_text(i, 1);
		row->central_url = sm_row_text(i, 2);
		row->active = sm_row_bool(i, 3);
		row->receipts = sm_row_bool(i, 4);
		rows = lappend(rows, row);
	}
	return rows;
}

/* In the order in which a branch's lanes are served. */
List *
sm_outbox_lanes(void)
{
	static SmQuery query = {
		"SELECT l.lane_id, l.log_id, l.epoch_no, e.epoch, l.branch_id, l.priority, l.settled_all,"
		" l.folded, l.batch, l.status = 'failed', l.attempt_count, l.first_attempt_at, l.last_attempt_at, l.error_message"
		" FROM softmobile.outbox_lane_state l JOIN softmobile.outbox_epoch e USING (epoch_no)"
		" WHERE NOT l.closed"
		" ORDER BY l.epoch_no, array_position('{HIGH,NORMAL,LOW}', l.priority)"
	};
	uint64		n = sm_query_run(&query, NULL);
	Oid			namespace = get_namespace_oid("softmobile", false);
	List	   *rows = NIL;

	for (uint64 i = 0; i < n; i++)
	{
		SmLaneRow  *row = palloc0(sizeof(SmLaneRow));
		char		sequence[NAMEDATALEN];

		row->lane_id = sm_row_int4(i, 1);
		row->log_id = sm_row_int4(i, 2);
		row->epoch_no = sm_row_int4(i, 3);
		row->epoch = sm_row_text(i, 4);
		row->branch = sm_row_text(i, 5);
		row->priority = sm_lanes_priority(sm_row_text(i, 6));
		row->settled = sm_outbox_row_ranges(i, 7);
		row->folded = sm_row_bool(i, 8);
		row->batch = sm_outbox_row_ranges(i, 9);
		row->failed = sm_row_bool(i, 10);
		row->attempt_count = sm_row_int4(i, 11);
		row->first_attempt_at = sm_row_time(i, 12);
		row->last_attempt_at = sm_row_time(i, 13);
		row->error_message = sm_row_text(i, 14);
		snprintf(sequence, sizeof(sequence), "lane_%d_seq", row->log_id);
		row->seqrelid = get_relname_relid(sequence, namespace);
		rows = lappend(rows, row);
	}
	return rows;
}

/*
 * Whether pg_restore is at work here.  Its jobs load tables in an order of their
 * own, each in a transaction of its own, and stay connected until all is done.
 */
bool
sm_outbox_restore_runs(void)
{
	static SmQuery query = {
		"SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_activity a"
		" WHERE a.datname = pg_catalog.current_database() AND a.application_name = 'pg_restore')"
	};

	sm_query_run(&query, NULL);
	return sm_row_bool(0, 1);
}

/* Registers branches (char *) met in rows; returns those that somebody else is just registering. */
List *
sm_outbox_register(List *branches)
{
	static SmQuery query = {
		"WITH done AS MATERIALIZED (SELECT softmobile.register_unknown_branches($1) AS branches)"
		" SELECT b FROM done, unnest($1) AS b WHERE b <> ALL (done.branches)", 1, {TEXTARRAYOID}, .writes = true
	};
	SmArgs		args = {0};
	Datum	   *names = palloc(sizeof(Datum) * list_length(branches));
	List	   *left = NIL;
	ListCell   *lc;
	uint64		n;

	foreach(lc, branches)
		names[foreach_current_index(lc)] = CStringGetTextDatum(lfirst(lc));
	sm_args_datum(&args, PointerGetDatum(construct_array(names, list_length(branches), TEXTOID, -1, false, TYPALIGN_INT)));
	n = sm_query_run(&query, &args);
	for (uint64 i = 0; i < n; i++)
		left = lappend(left, sm_row_text(i, 1));
	return left;
}

/*
 * The name of an entity type, or NULL.  There are some dozens; a join for each
 * event would take as long as all else about reading it.
 */
static const char *
find_entity_type(int entity_no)
{
	static SmQuery query = {"SELECT entity_no, entity_type FROM softmobile.outbox_entity"};

	if (entity_types == NULL)
	{
		n_entity_types = (int) sm_query_run(&query, NULL);
		entity_types = MemoryContextAlloc(pass_cxt, sizeof(EntityType) * Max(n_entity_types, 1));
		for (int i = 0; i < n_entity_types; i++)
		{
			entity_types[i].entity_no = sm_row_int4(i, 1);
			entity_types[i].name = MemoryContextStrdup(pass_cxt, sm_row_text(i, 2));
		}
		SPI_freetuptable(SPI_tuptable);
	}
	for (int i = 0; i < n_entity_types; i++)
		if (entity_types[i].entity_no == entity_no)
			return entity_types[i].name;
	return NULL;
}

/* Hands the rows of a cursor over, a few at a time, until it ends or row() says so. */
static void
hand_over(Portal cursor, SmOutboxRow row, void *arg)
{
	MemoryContext caller = CurrentMemoryContext;
	MemoryContext row_cxt = AllocSetContextCreate(caller, "softmobile event", ALLOCSET_DEFAULT_SIZES);
	bool		more = true;

	while (more)
	{
		SPITupleTable *rows;
		uint64		n;

		SPI_cursor_fetch(cursor, true, FETCH_ROWS);
		MemoryContextSwitchTo(caller);	/* SPI leaves its own behind */
		rows = SPI_tuptable;
		n = SPI_processed;
		more = n > 0;
		for (uint64 i = 0; i < n && more; i++)
		{
			SmEvent		event = {0};
			int			entity_no;

			MemoryContextReset(row_cxt);
			MemoryContextSwitchTo(row_cxt);
			SPI_tuptable = rows;	/* row() may run statements of its own */
			event.seq = sm_row_int8(i, 1);
			event.id = *DatumGetUUIDP(sm_row_datum(i, 2));
			event.op = DatumGetChar(sm_row_datum(i, 3));
			entity_no = sm_row_int4(i, 4);
			event.entity_id = TextDatumGetCString(sm_row_datum(i, 5));
			event.branch_id = sm_row_null(i, 6) ? NULL : TextDatumGetCString(sm_row_datum(i, 6));
			event.created_at = DatumGetTimestampTz(sm_row_datum(i, 7));
			event.reason = sm_row_null(i, 8) ? NULL : TextDatumGetCString(sm_row_datum(i, 8));
			event.actor = TextDatumGetCString(sm_row_datum(i, 9));
			event.payload = TextDatumGetCString(sm_row_datum(i, 10));
			event.payload_len = strlen(event.payload);
			event.xid = DatumGetTransactionId(sm_row_datum(i, 11));
			event.entity_type = find_entity_type(entity_no);
			more = row(&event, entity_no, arg);
			MemoryContextSwitchTo(caller);
		}
		SPI_freetuptable(rows);
	}
	SPI_cursor_close(cursor);
	MemoryContextDelete(row_cxt);
}

#define EVENT_COLUMNS \
	"e.seq, e.id, e.op, e.entity_no, e.entity_id, e.branch_id, e.created_at, e.reason, e.actor, e.payload, e.xmin"

/* The rows above a number, in order. */
void
sm_outbox_read_after(int log_id, int64 after, SmOutboxRow row, void *arg)
{
	static SmQuery query = {
		"SELECT " EVENT_COLUMNS " FROM softmobile.outbox_event e"
		" WHERE e.lane_id = $1 AND e.seq > $2 ORDER BY e.lane_id, e.seq", 2, {INT4OID, INT8OID}
	};
	SmArgs		args = {0};

	sm_args_int4(&args, log_id);
	sm_args_int8(&args, after);
	hand_over(sm_query_open(&query, &args), row, arg);
}

/*
 * The next stretch of numbers to read for a set: several of its ranges, if no
 * more than HOLE_MAX numbers lie between them.  Reading the few rows in between is
 * cheaper than a query for each range, and a join with the ranges would leave it
 * to the planner's guesses whether it reads the whole lane.
 */
static SmRange
next_stretch(const SmRanges *set, int *at)
{
	SmRange		stretch = set->range[(*at)++];

	while (*at < set->n && set->range[*at].lo - stretch.hi <= HOLE_MAX)
		stretch.hi = set->range[(*at)++].hi;
	return stretch;
}

/* Passes the rows on that belong to a set. */
typedef struct Filter
{
	const SmRanges *set;
	SmOutboxRow row;
	void	   *arg;
	bool		ended;
} Filter;

static bool
filter_row(const SmEvent *event, int entity_no, void *arg)
{
	Filter	   *filter = arg;

	if (!sm_ranges_contain(filter->set, event->seq))
		return true;
	filter->ended = !filter->row(event, entity_no, filter->arg);
	return !filter->ended;
}

/* The rows of a batch that was put together before, in order. */
void
sm_outbox_read_members(int log_id, const SmRanges *members, SmOutboxRow row, void *arg)
{
	static SmQuery query = {
		"SELECT " EVENT_COLUMNS " FROM softmobile.outbox_event e"
		" WHERE e.lane_id = $1 AND e.seq >= $2 AND e.seq < $3 ORDER BY e.lane_id, e.seq", 3,
		{INT4OID, INT8OID, INT8OID}
	};
	Filter		filter = {.set = members, .row = row, .arg = arg};

	for (int at = 0; at < members->n && !filter.ended;)
	{
		SmRange		stretch = next_stretch(members, &at);
		SmArgs		args = {0};

		sm_args_int4(&args, log_id);
		sm_args_int8(&args, stretch.lo);
		sm_args_int8(&args, stretch.hi);
		hand_over(sm_query_open(&query, &args), filter_row, &filter);
	}
}

/* Which numbers of these gaps are visible now (and of this branch, where given). */
void
sm_outbox_visible(int log_id, const char *branch, const SmRanges *gaps, SmRanges *visible)
{
	static SmQuery query = {
		"SELECT e.seq FROM softmobile.outbox_event e"
		" WHERE e.lane_id = $1 AND e.seq >= $2 AND e.seq < $3 AND ($4 IS NULL OR e.branch_id = $4)"
		" ORDER BY e.lane_id, e.seq", 4, {INT4OID, INT8OID, INT8OID, TEXTOID}
	};

	for (int at = 0; at < gaps->n;)
	{
		SmRange		stretch = next_stretch(gaps, &at);
		SmArgs		args = {0};
		uint64		n;

		sm_args_int4(&args, log_id);
		sm_args_int8(&args, stretch.lo);
		sm_args_int8(&args, stretch.hi);
		sm_args_text(&args, branch);
		n = sm_query_run(&query, &args);
		for (uint64 i = 0; i < n; i++)
		{
			int64		seq = sm_row_int8(i, 1);

			if (sm_ranges_contain(gaps, seq))
				sm_ranges_append(visible, seq, seq + 1);
		}
		SPI_freetuptable(SPI_tuptable);
	}
}

/*
 * One ledger row, and outbox_lane.settled brought up to date with the ledger when
 * the set is short.  A long one (many gaps open at once) would be rewritten whole
 * with every batch; then readers add the ledger's tail themselves.
 */
static void
write_ledger(const SmSettlement *s, const char *kind)
{
	static SmQuery insert = {
		"INSERT INTO softmobile.outbox_batch (lane_id, kind, members, last_seq, events, idempotency_key, attempt_count,"
		" first_attempt_at, last_attempt_at, accepted, duplicates, exceptions, session_id, settled_at)"
		" VALUES ($1, $2, $3::int8multirange, $4, $5, $6, $7, $8, $9, $10, $11, $12, nullif($13, 0), clock_timestamp())"
		" RETURNING batch_id", 13,
		{INT4OID, TEXTOID, TEXTOID, INT8OID, INT4OID, TEXTOID, INT4OID, TIMESTAMPTZOID, TIMESTAMPTZOID,
		INT4OID, INT4OID, INT4OID, INT8OID}
	};
	static SmQuery fold = {
		"UPDATE softmobile.outbox_lane l"
		" SET settled = l.settled + (SELECT range_agg(b.members) FROM softmobile.outbox_batch b"
		" WHERE b.lane_id = l.lane_id AND b.batch_id > l.settled_batch), settled_batch = $2"
		" WHERE l.lane_id = $1", 2, {INT4OID, INT8OID}
	};
	SmArgs		args = {0};
	int64		batch_id;

	sm_args_int4(&args, s->lane_id);
	sm_args_text(&args, kind);
	sm_args_text(&args, sm_ranges_text(s->members));
	sm_args_int8(&args, s->members->range[s->members->n - 1].hi - 1);
	sm_args_int4(&args, s->events);
	sm_args_text(&args, s->idempotency_key);
	sm_args_int4(&args, s->attempt_count);
	sm_args_time(&args, s->first_attempt_at);
	sm_args_time(&args, s->last_attempt_at);
	sm_args_int4(&args, s->accepted);
	sm_args_int4(&args, s->duplicates);
	sm_args_int4(&args, s->exceptions);
	sm_args_int8(&args, s->session_id);
	sm_query_run(&insert, &args);
	batch_id = sm_row_int8(0, 1);
	if (!s->fold)
		return;

	memset(&args, 0, sizeof(args));
	sm_args_int4(&args, s->lane_id);
	sm_args_int8(&args, batch_id);
	sm_query_run(&fold, &args);
}

void
sm_outbox_settle(const SmSettlement *settlement)
{
	static SmQuery clear = {
		"UPDATE softmobile.outbox_lane SET status = 'idle', batch = NULL, batch_key = NULL, attempt_count = 0,"
		" first_attempt_at = NULL, last_attempt_at = NULL, next_attempt_at = NULL, error_message = NULL"
		" WHERE lane_id = $1 AND status <> 'idle'", 1, {INT4OID}
	};
	SmArgs		args = {0};

	write_ledger(settlement, "sent");
	if (!settlement->whole)
		return;
	sm_args_int4(&args, settlement->lane_id);
	sm_query_run(&clear, &args);
}

void
sm_outbox_void(int lane_id, const SmRanges *voids, bool fold)
{
	SmSettlement settlement = {.lane_id = lane_id, .members = voids, .fold = fold};

	write_ledger(&settlement, "void");
}

/* Everything that a failed attempt writes: one row. */
void
sm_outbox_fail(int lane_id, const SmRanges *batch, const char *key, int attempts,
			   TimestampTz first, TimestampTz last, TimestampTz next, const char *error)
{
	static SmQuery query = {
		"UPDATE softmobile.outbox_lane SET status = 'failed', batch = $2::int8multirange, batch_key = $3, attempt_count = $4,"
		" first_attempt_at = $5, last_attempt_at = $6, next_attempt_at = $7, error_message = $8"
		" WHERE lane_id = $1", 8,
		{INT4OID, TEXTOID, TEXTOID, INT4OID, TIMESTAMPTZOID, TIMESTAMPTZOID, TIMESTAMPTZOID, TEXTOID}
	};
	SmArgs		args = {0};

	sm_args_int4(&args, lane_id);
	sm_args_text(&args, sm_ranges_text(batch));
	sm_args_text(&args, key);
	sm_args_int4(&args, attempts);
	sm_args_time(&args, first);
	sm_args_time(&args, last);
	sm_args_time(&args, next);
	sm_args_text(&args, error);
	sm_query_run(&query, &args);
}

void
sm_outbox_requeue(int lane_id)
{
	static SmQuery query = {
		"UPDATE softmobile.outbox_lane SET status = 'queued', attempt_count = 0, first_attempt_at = NULL,"
		" last_attempt_at = NULL, next_attempt_at = NULL, error_message = NULL"
		" WHERE lane_id = $1 AND status = 'failed'", 1, {INT4OID}
	};
	SmArgs		args = {0};

	sm_args_int4(&args, lane_id);
	sm_query_run(&query, &args);
}

/* True when a failed batch of the branch holds one of the events (uuid[]). */
bool
sm_outbox_batch_holds(const char *branch, Datum ids)
{
	static SmQuery query = {
		"SELECT 1 FROM softmobile.outbox_lane l, unnest(l.batch) AS r (seqs)"
		" JOIN softmobile.outbox_event e ON e.seq >= lower(r.seqs) AND e.seq < upper(r.seqs)"
		" WHERE l.branch_id = $1 AND l.status = 'failed' AND e.lane_id = l.log_id AND e.id = ANY ($2) LIMIT 1", 2,
		{TEXTOID, UUIDARRAYOID}
	};
	SmArgs		args = {0};

	sm_args_text(&args, branch);
	sm_args_datum(&args, ids);
	return sm_query_run(&query, &args) > 0;
}
