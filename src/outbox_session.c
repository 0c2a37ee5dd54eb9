/*
 * outbox_session.c
 *		The worker's SQL on sessions, users' requests, and housekeeping.
 *
 * Same rules as outbox.c.
 */
#include "postgres.h"

#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "guc.h"
#include "miscadmin.h"
#include "outbox.h"
#include "query.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

/* Blocks of a table that one step of attach(initial => 'snapshot') queues. */
#define SNAPSHOT_BLOCKS		64

/*
 * A session for a branch.  An automatic one prolongs the latest session of the
 * branch where that was automatic, ended well and began less than sync_interval
 * ago: a trickle of sales makes one session, not hundreds.
 */
int64
sm_outbox_open_session(const char *branch, bool manual, const char *user, const char *reason)
{
	static SmQuery prolong = {
		"UPDATE softmobile.sync_session SET status = 'running', finished_at = NULL"
		" WHERE id = (SELECT max(s.id) FROM softmobile.sync_session s WHERE s.branch_id = $1)"
		" AND mode = 'automatic' AND status = 'success' AND started_at > clock_timestamp() - $2 * interval '1 second'"
		" RETURNING id", 2, {TEXTOID, INT4OID}
	};
	static SmQuery insert = {
		"INSERT INTO softmobile.sync_session (branch_id, mode, status, started_at, triggered_by, reason)"
		" VALUES ($1, $2, 'running', clock_timestamp(), $3, $4) RETURNING id", 4,
		{TEXTOID, TEXTOID, TEXTOID, TEXTOID}
	};
	SmArgs		args = {0};

	if (!manual)
	{
		sm_args_text(&args, branch);
		sm_args_int4(&args, sm_sync_interval);
		if (sm_query_run(&prolong, &args) > 0)
			return sm_row_int8(0, 1);
		memset(&args, 0, sizeof(args));
	}
	sm_args_text(&args, branch);
	sm_args_text(&args, manual ? "manual" : "automatic");
	sm_args_text(&args, user);
	sm_args_text(&args, reason);
	sm_query_run(&insert, &args);
	return sm_row_int8(0, 1);
}

void
sm_outbox_progress(int64 session, int64 events, int64 differences)
{
	static SmQuery query = {
		"UPDATE softmobile.sync_session SET processed_events = processed_events + $2,"
		" differences_detected = differences_detected + $3 WHERE id = $1", 3,
		{INT8OID, INT8OID, INT8OID}
	};
	SmArgs		args = {0};

	sm_args_int8(&args, session);
	sm_args_int8(&args, events);
	sm_args_int8(&args, differences);
	sm_query_run(&query, &args);
}

/* Ends a session: well where error is NULL. */
void
sm_outbox_close_session(int64 session, const char *error)
{
	static SmQuery query = {
		"UPDATE softmobile.sync_session SET finished_at = clock_timestamp(), error_message = $2,"
		" status = CASE WHEN $2 IS NULL THEN 'success' ELSE 'failed' END WHERE id = $1", 2,
		{INT8OID, TEXTOID}
	};
	SmArgs		args = {0};

	sm_args_int8(&args, session);
	sm_args_text(&args, error);
	sm_query_run(&query, &args);
}

/* At the worker's start: sessions that the previous worker did not end. */
void
sm_outbox_abandon_sessions(void)
{
	static SmQuery query = {
		"UPDATE softmobile.sync_session SET status = 'failed', finished_at = clock_timestamp(),"
		" error_message = 'the worker ended' WHERE status = 'running'"
	};

	sm_query_run(&query, NULL);
}

/* The procedure's audit row of an automatic requeue. */
void
sm_outbox_audit_requeue(const char *branch, int64 events, const char *why)
{
	static SmQuery query = {
		"INSERT INTO softmobile.audit (action, branch_id, reason, events, details, current_user_name)"
		" VALUES ('requeue', $1, softmobile.automatic_reason(), $2, jsonb_build_object('why', $3), current_user)", 3,
		{TEXTOID, INT8OID, TEXTOID}
	};
	SmArgs		args = {0};

	sm_args_text(&args, branch);
	sm_args_int8(&args, events);
	sm_args_text(&args, why);
	sm_query_run(&query, &args);
}

void
sm_outbox_publish_link(const char *branch, const char *url, const char *state, TimestampTz since)
{
	static SmQuery query = {
		"INSERT INTO softmobile.link_state (branch_id, central_url, state, since) VALUES ($1, $2, $3, $4)"
		" ON CONFLICT (branch_id) DO UPDATE SET central_url = excluded.central_url, state = excluded.state,"
		" since = excluded.since", 4,
		{TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID}
	};
	SmArgs		args = {0};

	sm_args_text(&args, branch);
	sm_args_text(&args, url);
	sm_args_text(&args, state);
	sm_args_time(&args, since);
	sm_query_run(&query, &args);
}

/* What the worker before this one has published. */
List *
sm_outbox_links(void)
{
	static SmQuery query = {"SELECT branch_id, central_url, state, since FROM softmobile.link_state"};
	uint64		n = sm_query_run(&query, NULL);
	List	   *rows = NIL;

	for (uint64 i = 0; i < n; i++)
	{
		SmLinkRow  *row = palloc0(sizeof(SmLinkRow));

		row->branch = sm_row_text(i, 1);
		row->url = sm_row_text(i, 2);
		row->state = sm_row_text(i, 3);
		row->since = sm_row_time(i, 4);
		rows = lappend(rows, row);
	}
	return rows;
}

/* Takes what users have asked for by now off the table. */
List *
sm_outbox_take_requests(void)
{
	static SmQuery query = {
		"WITH taken AS (DELETE FROM softmobile.outbox_request RETURNING *)"
		" SELECT kind, branch_id, (extract(epoch FROM min_age) * 1000000)::bigint, ids, lane_id, seqs, resolution, adoption"
		" FROM taken ORDER BY request_id"
	};
	static SmQuery any = {"SELECT 1 FROM softmobile.outbox_request LIMIT 1"};
	List	   *rows = NIL;
	uint64		n;

	if (sm_query_run(&any, NULL) == 0)
		return NIL;
	n = sm_query_run(&query, NULL);
	for (uint64 i = 0; i < n; i++)
	{
		SmRequestRow *row = palloc0(sizeof(SmRequestRow));

		row->kind = sm_row_text(i, 1);
		row->branch = sm_row_text(i, 2);
		row->min_age_us = sm_row_null(i, 3) ? 0 : sm_row_int8(i, 3);
		row->ids = sm_row_null(i, 4) ? (Datum) 0 : sm_row_datum(i, 4);
		row->lane_id = sm_row_null(i, 5) ? 0 : sm_row_int4(i, 5);
		row->seqs = sm_outbox_row_ranges(i, 6);
		row->resolution = sm_row_text(i, 7);
		row->adoption = sm_row_null(i, 8) ? NULL : DatumGetUUIDP(sm_row_datum(i, 8));
		rows = lappend(rows, row);
	}
	return rows;
}

/*
 * Makes settled numbers pending again; returns those that are in the log and are
 * no exceptions.
 */
SmRanges
sm_outbox_resend(int lane_id, const SmRanges *seqs)
{
	static SmQuery query = {
		"WITH again AS (SELECT l.lane_id, range_agg(int8range(e.seq, e.seq + 1)) AS seqs"
		" FROM softmobile.outbox_lane_state l, unnest(l.settled_all * $2::int8multirange) AS r (seqs)"
		" JOIN softmobile.outbox_event e ON e.seq >= lower(r.seqs) AND e.seq < upper(r.seqs)"
		" WHERE l.lane_id = $1 AND e.lane_id = l.log_id AND (l.log_id = l.lane_id OR e.branch_id = l.branch_id)"
		" AND NOT EXISTS (SELECT FROM softmobile.outbox_exception x WHERE x.lane_id = l.lane_id AND x.seq = e.seq)"
		" GROUP BY l.lane_id)"
		" UPDATE softmobile.outbox_lane l SET settled = s.settled_all - again.seqs, closed = false,"
		" settled_batch = (SELECT coalesce(max(b.batch_id), 0) FROM softmobile.outbox_batch b WHERE b.lane_id = l.lane_id)"
		" FROM again JOIN softmobile.outbox_lane_state s USING (lane_id)"
		" WHERE l.lane_id = again.lane_id RETURNING again.seqs", 2, {INT4OID, TEXTOID}
	};
	SmArgs		args = {0};
	SmRanges	none = {0};

	sm_args_int4(&args, lane_id);
	sm_args_text(&args, sm_ranges_text(seqs));
	if (sm_query_run(&query, &args) == 0)
		return none;
	return sm_outbox_row_ranges(0, 1);
}

/*
 * Compares which database this is with which it was when the worker last looked,
 * and records it.  Returns why numbers may be used twice here, or NULL.  No
 * record at all is no reason: the table is not dumped, and CREATE EXTENSION, by
 * which a dump is restored, has opened an epoch of its own.
 */
char *
sm_outbox_check_identity(void)
{
	static SmQuery compare = {
		"SELECT CASE WHEN i.system_identifier <> $1 THEN 'another server'"
		" WHEN i.timeline <> $2 THEN 'another timeline (restored or promoted)'"
		" WHEN i.database_oid <> $3 THEN 'a copied database'"
		" WHEN i.event_oid <> 'softmobile.outbox_event'::regclass THEN 'a reloaded outbox' END"
		" FROM softmobile.outbox_identity i", 3, {TEXTOID, INT8OID, OIDOID}
	};
	static SmQuery forget = {"DELETE FROM softmobile.outbox_identity"};
	static SmQuery record = {
		"INSERT INTO softmobile.outbox_identity (system_identifier, timeline, database_oid, event_oid)"
		" VALUES ($1, $2, $3, 'softmobile.outbox_event'::regclass)", 3, {TEXTOID, INT8OID, OIDOID}
	};
	SmArgs		args = {0};
	char	   *why = NULL;

	sm_args_text(&args, psprintf(UINT64_FORMAT, GetSystemIdentifier()));
	sm_args_int8(&args, GetWALInsertionTimeLine());
	sm_args_datum(&args, ObjectIdGetDatum(MyDatabaseId));
	if (sm_query_run(&compare, &args) > 0)
	{
		why = sm_row_text(0, 1);
		if (why == NULL)
			return NULL;
		sm_query_run(&forget, NULL);
	}
	sm_query_run(&record, &args);
	return why;
}

/* Begins a new generation of lanes. */
void
sm_outbox_open_epoch(const char *why)
{
	static SmQuery query = {"SELECT softmobile.open_epoch($1)", 1, {TEXTOID}, .writes = true};
	SmArgs		args = {0};

	sm_args_text(&args, why);
	sm_query_run(&query, &args);
}

/* Queues some existing rows of a table attached with initial => 'snapshot'. */
bool
sm_outbox_snapshot_step(void)
{
	static SmQuery any = {"SELECT 1 FROM softmobile.outbox_snapshot LIMIT 1"};
	static SmQuery step = {"SELECT softmobile.snapshot_step($1)", 1, {INT8OID}, .writes = true};
	SmArgs		args = {0};

	if (sm_query_run(&any, NULL) == 0)
		return false;
	sm_args_int8(&args, SNAPSHOT_BLOCKS);
	return sm_query_run(&step, &args) > 0 && sm_row_bool(0, 1);
}

/* Gives a piece of an emptied segment's files back; returns whether there is more. */
bool
sm_outbox_shrink_trash(void)
{
	static SmQuery query = {"SELECT softmobile.shrink_trash()", .writes = true};

	return sm_query_run(&query, NULL) > 0 && sm_row_bool(0, 1);
}

/* Opens a new segment, empties an old one, closes lanes, when it is time. */
void
sm_outbox_keep_house(void)
{
	static SmQuery segments = {"SELECT softmobile.recycle_segments($1 * interval '1 minute')", 1, {INT4OID}, .writes = true};
	static SmQuery lanes = {"SELECT softmobile.close_lanes()", .writes = true};
	SmArgs		args = {0};

	sm_args_int4(&args, sm_retention);
	sm_query_run(&segments, &args);
	sm_query_run(&lanes, NULL);
}
