/*
 * outbox_exception.c
 *		The worker's SQL on exceptions: events that central did not accept, and
 *		those of the same entities that wait behind them.
 *
 * Same rules as outbox.c.
 *
 * A conflict resolved for central has an adoption: the event by which the branch
 * took over central's row.  The entity's events before that one, of which some may
 * still be in the log, are overruled (resolution central), and the adoption itself
 * wins (resolution local), for it is known to differ from what central holds only
 * in what the branch's own triggers made of the row.  Which is which can be told
 * when the adoption has been put aside behind the conflict: then so has everything
 * before it.  Until that moment the conflict does not go, so that nothing of its
 * entity is sent undecided.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "guc.h"
#include "outbox.h"
#include "query.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

/* Copies an event out of the log; its number is settled by the caller's ledger row. */
void
sm_outbox_add_exception(int lane_id, int log_id, const SmExceptionRow *row, int64 seq, const char *branch)
{
	static SmQuery query = {
		"INSERT INTO softmobile.outbox_exception (id, lane_id, seq, entity_no, entity_id, op, branch_id, created_at, actor, reason,"
		" folio, amount, payload, kind, state, waits_for, attempt_count, last_attempt_at, next_attempt_at, error_message, central_row, resolution)"
		" SELECT e.id, $1, e.seq, e.entity_no, e.entity_id, e.op, $4, e.created_at, e.actor, e.reason,"
		" e.folio, e.amount, e.payload, $5, 'failed', $6, $7, $8, $9, $10, $11::jsonb, CASE WHEN $5 = 'waiting' THEN ("
		"SELECT CASE WHEN e.id = x.adoption THEN 'local'"
		" WHEN NOT EXISTS (SELECT FROM softmobile.outbox_exception a WHERE a.id = x.adoption) THEN 'central' END"
		" FROM softmobile.outbox_exception x WHERE x.branch_id = $4 AND x.entity_no = e.entity_no AND x.entity_id = e.entity_id"
		" AND x.state IN ('failed', 'queued') AND x.adoption IS NOT NULL LIMIT 1) END"
		" FROM softmobile.outbox_event e WHERE e.lane_id = $2 AND e.seq = $3"
		" ON CONFLICT (id) DO NOTHING", 11,
		{INT4OID, INT4OID, INT8OID, TEXTOID, TEXTOID, UUIDOID, INT4OID, TIMESTAMPTZOID, TIMESTAMPTZOID, TEXTOID, TEXTOID}
	};
	SmArgs		args = {0};

	sm_args_int4(&args, lane_id);
	sm_args_int4(&args, log_id);
	sm_args_int8(&args, seq);
	sm_args_text(&args, branch);
	sm_args_text(&args, row->kind);
	sm_args_uuid(&args, row->waits_for);
	sm_args_int4(&args, row->attempt_count);
	sm_args_time(&args, row->last_attempt_at);
	sm_args_time(&args, row->next_attempt_at);
	sm_args_text(&args, row->error_message);
	sm_args_text(&args, row->central_row);
	sm_query_run(&query, &args);
}

/* Entities of a branch that have an open exception, with the first one of each. */
List *
sm_outbox_blocked(const char *branch)
{
	static SmQuery query = {
		"SELECT DISTINCT ON (entity_no, entity_id) entity_no, entity_id, id FROM softmobile.outbox_exception"
		" WHERE branch_id = $1 AND state IN ('failed', 'queued')"
		" ORDER BY entity_no, entity_id, created_at, seq", 1, {TEXTOID}
	};
	SmArgs		args = {0};
	List	   *rows = NIL;
	uint64		n;

	sm_args_text(&args, branch);
	n = sm_query_run(&query, &args);
	for (uint64 i = 0; i < n; i++)
	{
		SmBlockedEntity *row = palloc0(sizeof(SmBlockedEntity));

		row->entity_no = sm_row_int4(i, 1);
		row->entity_id = sm_row_text(i, 2);
		row->exception = *DatumGetUUIDP(sm_row_datum(i, 3));
		rows = lappend(rows, row);
	}
	return rows;
}

/* Of two events of an entity: whether b is the earlier one.  The clock may have been set back. */
#define EARLIER(b, x) \
	"CASE WHEN " b ".lane_id = " x ".lane_id THEN " b ".seq < " x ".seq ELSE " b ".created_at < " x ".created_at END"

/*
 * Queued exceptions that are to be sent next: of each entity only the first open
 * one, and of one lane at a time.
 */
uint64
sm_outbox_queued_exceptions(const char *branch, int limit, SmExceptionEvent **events)
{
	static SmQuery query = {
		"SELECT q.id, q.lane_id, q.seq, q.op, t.entity_type, q.entity_id, q.created_at, q.reason, q.actor, q.payload,"
		" q.resolution, q.attempt_count, q.entity_no"
		" FROM (SELECT x.*, min(x.lane_id) OVER () AS first_lane FROM softmobile.outbox_exception x"
		" WHERE x.branch_id = $1 AND x.state = 'queued'"
		" AND NOT EXISTS (SELECT FROM softmobile.outbox_exception b"
		" WHERE b.branch_id = x.branch_id AND b.entity_no = x.entity_no AND b.entity_id = x.entity_id"
		" AND b.state IN ('failed', 'queued') AND " EARLIER("b", "x") ")"
		" AND (x.adoption IS NULL OR EXISTS (SELECT FROM softmobile.outbox_exception a WHERE a.id = x.adoption))) AS q"
		" JOIN softmobile.outbox_entity t USING (entity_no)"
		" WHERE q.lane_id = q.first_lane ORDER BY q.seq LIMIT $2", 2, {TEXTOID, INT4OID}
	};
	SmArgs		args = {0};
	uint64		n;

	sm_args_text(&args, branch);
	sm_args_int4(&args, limit);
	n = sm_query_run(&query, &args);
	*events = palloc0(sizeof(SmExceptionEvent) * Max(n, 1));
	for (uint64 i = 0; i < n; i++)
	{
		SmExceptionEvent *x = &(*events)[i];

		x->event.id = *DatumGetUUIDP(sm_row_datum(i, 1));
		x->lane_id = sm_row_int4(i, 2);
		x->event.seq = sm_row_int8(i, 3);
		x->event.op = DatumGetChar(sm_row_datum(i, 4));
		x->event.entity_type = sm_row_text(i, 5);
		x->event.entity_id = sm_row_text(i, 6);
		x->event.branch_id = pstrdup(branch);
		x->event.created_at = sm_row_time(i, 7);
		x->event.reason = sm_row_text(i, 8);
		x->event.actor = sm_row_text(i, 9);
		x->event.payload = sm_row_text(i, 10);
		x->event.payload_len = strlen(x->event.payload);
		x->event.resolution = sm_row_text(i, 11);
		x->attempt_count = sm_row_int4(i, 12);
		x->entity_no = sm_row_int4(i, 13);
	}
	return n;
}

/* Central has it: what waited for it goes next. */
void
sm_outbox_exception_delivered(const pg_uuid_t *id)
{
	static SmQuery delivered = {
		"UPDATE softmobile.outbox_exception SET state = CASE resolution WHEN 'central' THEN 'dropped' ELSE 'delivered' END,"
		" error_message = NULL, next_attempt_at = NULL,"
		" last_attempt_at = clock_timestamp(), updated_at = clock_timestamp() WHERE id = $1", 1, {UUIDOID}
	};
	static SmQuery release = {
		"UPDATE softmobile.outbox_exception w SET state = 'queued', error_message = NULL, updated_at = clock_timestamp()"
		" FROM softmobile.outbox_exception x"
		" WHERE x.id = $1 AND w.branch_id = x.branch_id AND w.entity_no = x.entity_no AND w.entity_id = x.entity_id"
		" AND w.kind = 'waiting' AND w.state = 'failed'", 1, {UUIDOID}
	};
	SmArgs		args = {0};

	sm_args_uuid(&args, id);
	sm_query_run(&delivered, &args);
	sm_query_run(&release, &args);
}

/*
 * A retried exception was not accepted again: what had waited for an earlier one
 * waits for it.  What is in conflict again needs a new decision.
 */
void
sm_outbox_exception_failed(const pg_uuid_t *id, const SmExceptionRow *row)
{
	static SmQuery query = {
		"UPDATE softmobile.outbox_exception SET state = 'failed', kind = $2, attempt_count = $3, last_attempt_at = $4,"
		" next_attempt_at = $5, error_message = $6, central_row = CASE WHEN $2 = 'conflict' THEN $7::jsonb ELSE central_row END,"
		" resolution = CASE WHEN $2 <> 'conflict' THEN resolution END, adoption = CASE WHEN $2 <> 'conflict' THEN adoption END,"
		" updated_at = clock_timestamp()"
		" WHERE id = $1", 7,
		{UUIDOID, TEXTOID, INT4OID, TIMESTAMPTZOID, TIMESTAMPTZOID, TEXTOID, TEXTOID}
	};
	static SmQuery hold = {
		"UPDATE softmobile.outbox_exception w SET state = 'failed', waits_for = x.id, error_message = 'waits for ' || x.id,"
		" updated_at = clock_timestamp()"
		" FROM softmobile.outbox_exception x"
		" WHERE x.id = $1 AND w.branch_id = x.branch_id AND w.entity_no = x.entity_no AND w.entity_id = x.entity_id"
		" AND w.kind = 'waiting' AND w.state = 'queued'", 1, {UUIDOID}
	};
	SmArgs		args = {0};

	sm_args_uuid(&args, id);
	sm_args_text(&args, row->kind);
	sm_args_int4(&args, row->attempt_count);
	sm_args_time(&args, row->last_attempt_at);
	sm_args_time(&args, row->next_attempt_at);
	sm_args_text(&args, row->error_message);
	sm_args_text(&args, row->central_row);
	sm_query_run(&query, &args);

	memset(&args, 0, sizeof(args));
	sm_args_uuid(&args, id);
	sm_query_run(&hold, &args);
}

/*
 * Queues rejected exceptions whose time has come; with a branch of NULL or an
 * age, those of all branches or of at least that age (a user's requeue).  One whose
 * attempt lies in the future is due: the clock has been set back since.
 */
int64
sm_outbox_requeue_exceptions(const char *branch, int64 min_age_us)
{
	static SmQuery query = {
		"UPDATE softmobile.outbox_exception SET state = 'queued', updated_at = clock_timestamp()"
		" WHERE state = 'failed' AND kind = 'rejected' AND branch_id = $1 AND attempt_count < $2"
		" AND (last_attempt_at > clock_timestamp() OR CASE WHEN $3 < 0 THEN next_attempt_at <= clock_timestamp()"
		" ELSE last_attempt_at <= clock_timestamp() - $3 * interval '1 microsecond' END)", 3,
		{TEXTOID, INT4OID, INT8OID}
	};
	SmArgs		args = {0};

	sm_args_text(&args, branch);
	sm_args_int4(&args, sm_max_attempts);
	sm_args_int8(&args, min_age_us);
	return (int64) sm_query_run(&query, &args);
}

/* When the next rejected exception of a branch is due; 0: none. */
TimestampTz
sm_outbox_next_exception(const char *branch)
{
	static SmQuery query = {
		"SELECT min(CASE WHEN last_attempt_at > clock_timestamp() THEN clock_timestamp() ELSE next_attempt_at END)"
		" FROM softmobile.outbox_exception"
		" WHERE state = 'failed' AND kind = 'rejected' AND branch_id = $1 AND attempt_count < $2", 2,
		{TEXTOID, INT4OID}
	};
	SmArgs		args = {0};

	sm_args_text(&args, branch);
	sm_args_int4(&args, sm_max_attempts);
	sm_query_run(&query, &args);
	return sm_row_time(0, 1);
}

/* A user's retry of certain events, whatever their attempts; for one that waits, of what it waits for. */
int64
sm_outbox_retry_exceptions(Datum ids)
{
	static SmQuery query = {
		"UPDATE softmobile.outbox_exception SET state = 'queued', attempt_count = 0, error_message = NULL,"
		" last_attempt_at = NULL, next_attempt_at = NULL, updated_at = clock_timestamp()"
		" WHERE state = 'failed' AND kind = 'rejected' AND (id = ANY ($1) OR id IN ("
		"SELECT w.waits_for FROM softmobile.outbox_exception w WHERE w.id = ANY ($1) AND w.kind = 'waiting' AND w.state = 'failed'))", 1,
		{UUIDARRAYOID}
	};
	SmArgs		args = {0};

	sm_args_datum(&args, ids);
	return (int64) sm_query_run(&query, &args);
}

/*
 * A user's decision on a conflict; one that is none any more is left alone.  For
 * central (adoption not NULL) it holds for what waits behind it too.
 */
void
sm_outbox_resolve_conflict(Datum ids, const char *resolution, const pg_uuid_t *adoption)
{
	static SmQuery decide = {
		"UPDATE softmobile.outbox_exception SET state = 'queued', resolution = $2, adoption = $3, error_message = NULL,"
		" updated_at = clock_timestamp()"
		" WHERE id = ANY ($1) AND kind = 'conflict' AND state = 'failed'", 3, {UUIDARRAYOID, TEXTOID, UUIDOID}
	};
	static SmQuery overrule = {
		"UPDATE softmobile.outbox_exception w SET resolution = CASE WHEN w.id = x.adoption THEN 'local' ELSE 'central' END,"
		" updated_at = clock_timestamp()"
		" FROM softmobile.outbox_exception x LEFT JOIN softmobile.outbox_exception a ON a.id = x.adoption"
		" WHERE x.id = ANY ($1) AND w.branch_id = x.branch_id AND w.entity_no = x.entity_no AND w.entity_id = x.entity_id"
		" AND w.kind = 'waiting' AND w.state = 'failed'"
		" AND (a.id IS NULL OR w.id = a.id OR " EARLIER("w", "a") ")", 1, {UUIDARRAYOID}
	};
	SmArgs		args = {0};

	sm_args_datum(&args, ids);
	sm_args_text(&args, resolution);
	sm_args_uuid(&args, adoption);
	if (sm_query_run(&decide, &args) == 0 || adoption == NULL)
		return;
	memset(&args, 0, sizeof(args));
	sm_args_datum(&args, ids);
	sm_query_run(&overrule, &args);
}
