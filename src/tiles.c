/*
 * tiles.c
 *		Counting the log, block by block, for statistics (32-tiles.sql).
 *
 * Called by the worker between passes, in a transaction of its own, under no
 * lock but that of writing to outbox_tile.  It reads each block once, when all of
 * its numbers are decided, and takes at most a tenth of the worker's time.
 *
 * When are they?  By the argument of gaps.c: whoever can still write a number
 * that was drawn holds the lane's sequence.  So a mark is set: the blocks that lie
 * below a visible number, and the holders read after the snapshot that showed it.
 * Once all of those were gone before a snapshot was taken, that snapshot shows
 * everything that the marked blocks will ever hold.  A transaction that has
 * written to a lane and stays open holds up the tiles of that lane: its figures
 * stay right, but more of them is read from the log.
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "delivery.h"
#include "query.h"
#include "tiles.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

/* Blocks counted in one transaction, and how long to wait when there are no more. */
#define BLOCKS_AT_ONCE		8
#define LOOK_MS				5000

/* The worker's time belongs to the delivery: one part in so many is spent here. */
#define SHARE				10

typedef struct TiledLog
{
	int			log_id;
	int64		decided;		/* blocks below are decided */
	int64		marked;			/* ... and those below as soon as the holders are gone */
	SmHolders	holders;
	bool		over;			/* they were, before the next snapshot */
} TiledLog;

static List *logs = NIL;		/* of TiledLog */
static TimestampTz next_time = 0;

static TiledLog *
find_log(int log_id)
{
	MemoryContext caller;
	TiledLog   *log;
	ListCell   *lc;

	foreach(lc, logs)
	{
		log = lfirst(lc);
		if (log->log_id == log_id)
			return log;
	}
	caller = MemoryContextSwitchTo(sm_delivery_cxt);
	log = palloc0(sizeof(TiledLog));
	log->log_id = log_id;
	logs = lappend(logs, log);
	MemoryContextSwitchTo(caller);
	return log;
}

static void
set_mark(TiledLog *log, int64 block, const SmHolders *holders)
{
	log->marked = block;
	log->over = holders->n == 0;
	log->holders.n = holders->n;
	if (holders->n == 0)
		return;
	log->holders.vxid = MemoryContextAlloc(sm_delivery_cxt, holders->n * sizeof(uint64));
	memcpy(log->holders.vxid, holders->vxid, holders->n * sizeof(uint64));
}

/* Moves a log's marks on; drawn: its blocks all of whose numbers have been drawn. */
static void
advance(TiledLog *log, int64 drawn)
{
	char		name[NAMEDATALEN];
	SmHolders	holders;

	if (log->over)
	{
		log->decided = log->marked;
		log->over = false;
		if (log->holders.vxid != NULL)
			pfree(log->holders.vxid);
		log->holders.vxid = NULL;
	}
	if (log->marked == log->decided && drawn <= log->decided)
		return;

	snprintf(name, sizeof(name), "lane_%d_seq", log->log_id);
	holders = sm_gaps_holders(get_relname_relid(name, get_namespace_oid("softmobile", false)));
	if (!holders.complete)
		return;
	if (log->marked == log->decided)
		set_mark(log, drawn, &holders);
	else
	{
		(void) sm_gaps_strike_off(&log->holders, &holders);
		log->over = log->holders.n == 0;
	}
}

/* Counts some blocks of a log. */
static void
count_blocks(int log_id, int64 first, int64 last)
{
	static SmQuery query = {
		"SELECT softmobile.write_tiles($1, $2, $3)", 3, {INT4OID, INT8OID, INT8OID}, .writes = true
	};
	SmArgs		args = {0};

	sm_args_int4(&args, log_id);
	sm_args_int8(&args, first);
	sm_args_int8(&args, last);
	sm_query_run(&query, &args);
}

/* What there is to count in a log. */
typedef struct ToCount
{
	int			log_id;
	int64		drawn;			/* blocks all of whose numbers have been drawn */
	int64		next;			/* block of the first event that no tile counts */
} ToCount;

static List *
find_uncounted(void)
{
	static SmQuery query = {
		"SELECT l.lane_id,"
		" (SELECT e.seq FROM softmobile.outbox_event e WHERE e.lane_id = l.lane_id"
		" ORDER BY e.lane_id DESC, e.seq DESC LIMIT 1) / softmobile.tile_size(),"
		" (SELECT e.seq - 1 FROM softmobile.outbox_event e WHERE e.lane_id = l.lane_id AND e.seq > coalesce((SELECT t.block + 1"
		" FROM softmobile.outbox_tile t WHERE t.log_id = l.lane_id ORDER BY t.log_id DESC, t.block DESC LIMIT 1), 0) * softmobile.tile_size()"
		" ORDER BY e.lane_id, e.seq LIMIT 1) / softmobile.tile_size()"
		" FROM softmobile.outbox_lane l WHERE l.log_id = l.lane_id ORDER BY l.lane_id"
	};
	uint64		n = sm_query_run(&query, NULL);
	List	   *found = NIL;

	for (uint64 i = 0; i < n; i++)
	{
		ToCount    *log;

		if (sm_row_null(i, 3))
			continue;
		log = palloc(sizeof(ToCount));
		log->log_id = sm_row_int4(i, 1);
		log->drawn = sm_row_int8(i, 2);
		log->next = sm_row_int8(i, 3);
		found = lappend(found, log);
	}
	return found;
}

bool
sm_tiles_due(void)
{
	TimestampTz now = GetCurrentTimestamp();

	/* A clock that was set back makes it due too. */
	return next_time <= now || TimestampDifferenceExceeds(now, next_time, LOOK_MS + 1);
}

void
sm_tiles_write(void)
{
	TimestampTz start = GetCurrentTimestamp();
	int64		room = BLOCKS_AT_ONCE;
	bool		more = false;
	ListCell   *lc;

	foreach(lc, find_uncounted())
	{
		ToCount    *to_count = lfirst(lc);
		TiledLog   *log = find_log(to_count->log_id);
		int64		beyond;

		advance(log, to_count->drawn);
		beyond = Min(log->decided, to_count->next + room);
		if (to_count->next < beyond)
		{
			count_blocks(log->log_id, to_count->next, beyond - 1);
			room -= beyond - to_count->next;
		}
		more |= log->over || beyond < log->decided;
	}
	next_time = GetCurrentTimestamp();
	if (more)
		next_time += Min((next_time - start) * SHARE, LOOK_MS * INT64CONST(1000));
	else
		next_time = TimestampTzPlusMilliseconds(next_time, LOOK_MS);
}

long
sm_tiles_timeout_ms(void)
{
	return TimestampDifferenceMilliseconds(GetCurrentTimestamp(), next_time);
}
