/*
 * delivery.c
 *		One pass of the worker: take answers, take requests, put the next batches
 *		together, send them.
 *
 * A pass never waits.  It opens a transaction for each kind of work and has none
 * open when it returns, so that nothing is held while sockets wait:
 *
 *	1. branches and lanes are read anew when they have changed;
 *	2. answers that have arrived are carried out (answer.c), each in a transaction;
 *	3. users' requests are applied; sync_run() callers get a manual session;
 *	4. under one snapshot, each branch that is free gets its next batch (batch.c);
 *	5. the WAL is flushed past everything that the snapshot showed: no event
 *	   leaves before its commit is on disk;
 *	6. the batches are submitted, and what carries no event (probe.c).
 *
 * One batch per branch is in flight, so one branch's trouble never delays
 * another's.  Lanes of an older epoch go first, HIGH before NORMAL before LOW.
 *
 * While it is on its way the next one is built.  If all events of the first are
 * accepted and nothing else wants to be looked at before, the next one leaves at
 * once, and the first is settled while central works on it (send_follower()).
 */
#include "postgres.h"

#include "access/transam.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "answer.h"
#include "compat.h"
#include "delivery.h"
#include "guc.h"
#include "http.h"
#include "miscadmin.h"
#include "outbox.h"
#include "process.h"
#include "request.h"
#include "shmem.h"
#include "sign.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

/* Requests in flight at once, and memory of bodies above which no batch is built. */
#define MAX_IN_FLIGHT		32
#define MAX_BODY_MEMORY		(24 * 1024 * 1024)

/* Longest answer that is read: a receipt can refuse every event of a batch. */
#define MAX_RECEIPT			(8 * 1024 * 1024)

/* A batch that was built longer ago may no longer be what is to go next. */
#define READY_MS				200

/* Waits between looks when nothing else calls for one. */
#define IDLE_MS				5000
#define OPEN_GAP_MS			1000
#define HELD_MS				1000
#define PRESSING_MS			5

MemoryContext sm_delivery_cxt = NULL;

static Oid	extension_oid = InvalidOid;
static int	in_flight = 0;
static bool snapshots_left = true;	/* tables attached with initial => 'snapshot' */

void
sm_delivery_init(Oid extension)
{
	sm_delivery_cxt = AllocSetContextCreate(TopMemoryContext, "softmobile delivery", ALLOCSET_DEFAULT_SIZES);
	extension_oid = extension;
}

/* A transaction of the worker; it leaves when the extension is no more. */
void
sm_delivery_begin(void)
{
	if (!sm_outbox_begin(extension_oid))
		sm_process_leave(SM_VERDICT_LEFT);
}

/* --- sending --- */

/*
 * Flushes the WAL past all that is visible now.  An insertion pointer at the very
 * beginning of a page points behind the page's header, where nothing has been
 * written yet.
 */
static void
flush_wal(void)
{
	XLogRecPtr	end = GetXLogInsertRecPtr();

	if (end % XLOG_BLCKSZ == SizeOfXLogShortPHD)
		end -= SizeOfXLogShortPHD;
	else if (XLogSegmentOffset(end, wal_segment_size) == SizeOfXLogLongPHD)
		end -= SizeOfXLogLongPHD;
	XLogFlush(end);
}

/*
 * Transactions before this one had ended when the WAL was flushed last; so what
 * the log shows of them is on disk.  Without that knowledge each batch of a long
 * backlog would flush what others, who sell meanwhile, have just written, and they
 * would wait for it.
 */
static TransactionId on_disk_before = InvalidTransactionId;

bool
sm_delivery_on_disk(TransactionId xid)
{
	return TransactionIdIsNormal(xid) && TransactionIdIsNormal(on_disk_before) &&
		TransactionIdPrecedes(xid, on_disk_before);
}

/* Transaction numbers are compared within a horizon; what is known of one far away is forgotten. */
static void
check_horizon(TransactionId xmin)
{
	if (TransactionIdIsNormal(on_disk_before) && xmin - on_disk_before > PG_INT32_MAX / 2)
		on_disk_before = InvalidTransactionId;
}

/* xmin: of the snapshot that the batches were read with */
static void
flush_for(List *batches, TransactionId xmin)
{
	ListCell   *lc;
	bool		needed = false;

	foreach(lc, batches)
		needed |= ((SmBatch *) lfirst(lc))->needs_flush;
	if (!needed)
		return;
	flush_wal();
	on_disk_before = xmin;
	foreach(lc, batches)
		((SmBatch *) lfirst(lc))->needs_flush = false;
}

/* NULL, or why it cannot be sent now. */
static const char *
submit(SmBatch *batch, const char *token)
{
	SmBranch   *branch = batch->branch;
	char		traceparent[SM_WIRE_TRACEPARENT_LEN];
	const char *problem;
	SmHttpRequest request = {
		.method = "POST",
		.url = psprintf("%s/events", batch->endpoint->url),
		.body = batch->body.out.data,
		.body_len = batch->body.out.len,
		.content_type = "application/cloudevents-batch+json; charset=UTF-8",
		.content_encoding = sm_wire_encoding(&batch->body),
		.bearer = token,
		.idempotency_key = batch->key,
		.reason = branch->session_reason,
		.traceparent = traceparent,
		.connect_timeout_ms = sm_connect_timeout,
		.request_timeout_ms = sm_request_timeout,
		.max_response = MAX_RECEIPT,
		.tag = batch,
	};

	sm_wire_traceparent(traceparent, batch->trace_id);
	problem = sm_sign_request(&request, batch->key);
	if (problem == NULL && !sm_http_submit(&request))
		problem = "configuration: no further request is possible";
	return problem;
}

/* Nothing is left to send: the session is over, unless its link has yet to be checked. */
static void
branch_is_drained(SmBranch *branch)
{
	ListCell   *lc;

	foreach(lc, branch->lanes)
		sm_answer_nothing_else(lfirst(lc));
	branch->force = false;
	if (branch->session == 0)
		return;
	if (branch->manual && !branch->checked && branch->session_error == NULL)
	{
		if (!branch->checking)
			branch->checking = sm_probe_branch(branch);
		return;
	}
	sm_session_end(branch, branch->session_error);
}

/* Queued exceptions of a branch that can go now, or NULL. */
static SmBatch *
pick_exceptions(SmBranch *branch)
{
	SmBatch    *batch;

	if (branch->exceptions_idle || branch->in_flight != NULL)
		return NULL;
	batch = sm_batch_exceptions(branch);
	branch->exceptions_idle = batch == NULL;
	return batch;
}

/* The next batch of a branch, built; NULL when there is none now. */
static SmBatch *
pick_batch(SmBranch *branch, TimestampTz now)
{
	ListCell   *lc;
	int			stuck_epoch = INT_MAX;
	SmBatch    *batch = pick_exceptions(branch);

	if (batch != NULL)
		return batch;
	foreach(lc, branch->lanes)
	{
		SmLane	   *lane = lfirst(lc);

		if (lane->epoch_no > stuck_epoch)
			break;				/* what is older goes first */
		while ((batch = sm_reading_next(lane)) != NULL)
		{
			if (lane->not_before > now)
				break;
			if (sm_batch_build(batch))
				return batch;
			sm_batch_settle_asides(batch);
			sm_batch_free(batch);
		}
		if (lane->queue != NIL)
			stuck_epoch = lane->epoch_no;
	}
	return NULL;
}

static bool
may_send(SmBranch *branch, TimestampTz now)
{
	if (branch->endpoint == NULL || !branch->active || branch->in_flight != NULL || branch->checking)
		return false;
	/* Which numbers were used before must be known, unless the link is known to be down. */
	if (branch->verify == SM_VERIFY_ASKED || (branch->verify == SM_VERIFY_DUE && !branch->endpoint->down))
		return false;
	if (branch->force)
		return true;
	return branch->not_before <= now && !branch->endpoint->down;
}

/* May another batch follow the one that has just been answered, before anything else? */
static bool
may_send_another(const SmBranch *branch, TimestampTz now)
{
	return branch->endpoint != NULL && !branch->endpoint->down && branch->active && branch->exceptions_idle &&
		branch->verify == SM_VERIFY_DONE && branch->verify_at > now && !branch->checking &&
		branch->not_before <= now && branch->requeue_at == 0 &&
		(branch->next_exception == 0 || branch->next_exception > now) &&
		branch->session != 0 &&
		(branch->manual || !TimestampDifferenceExceeds(branch->session_started, now, sm_sync_interval * 1000));
}

/*
 * While a batch is on its way and more is waiting behind it, the next one is
 * built, to be sent as soon as the answer is there.  Returns it, or NULL.
 */
static SmBatch *
prepare_next(SmBranch *branch, TimestampTz now)
{
	SmLane	   *lane = branch->in_flight->lane;

	if (lane == NULL || !lane->more || branch->endpoint->down || sm_batch_memory() >= MAX_BODY_MEMORY)
		return NULL;
	return pick_batch(branch, now);
}

/*
 * Chooses batches for all free branches; returns those to submit, those that
 * follow what is on its way, and whether another pass should look again.
 */
static List *
pick_batches(TimestampTz now, List **followers, bool *again)
{
	List	   *batches = NIL;
	ListCell   *lc;

	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);
		SmBatch    *batch;

		if (in_flight + list_length(batches) >= MAX_IN_FLIGHT || sm_batch_memory() > MAX_BODY_MEMORY)
			break;
		if (branch->in_flight != NULL && (batch = prepare_next(branch, now)) != NULL)
			*followers = lappend(*followers, batch);
		if (!may_send(branch, now))
			continue;
		if (branch->session != 0 && !branch->manual &&
			TimestampDifferenceExceeds(branch->session_started, now, sm_sync_interval * 1000))
			sm_session_end(branch, branch->session_error);
		batch = pick_batch(branch, now);
		if (batch == NULL)
		{
			/* An exception may have waited for what was just put aside; the next snapshot shows that. */
			if (!branch->exceptions_idle)
				*again = true;
			else
				branch_is_drained(branch);
			continue;
		}
		if (branch->session == 0)
			sm_session_open(branch, false, "softmobile worker", NULL);
		branch->in_flight = batch;
		batches = lappend(batches, batch);
	}
	/* The branches that were served first this time come last the next time. */
	if (list_length(sm_delivery_branches) > 1 && batches != NIL)
	{
		MemoryContext caller = MemoryContextSwitchTo(sm_delivery_cxt);
		SmBranch   *first = linitial(sm_delivery_branches);

		sm_delivery_branches = lappend(list_delete_first(sm_delivery_branches), first);
		MemoryContextSwitchTo(caller);
	}
	return batches;
}

static void
submit_batches(List *batches)
{
	ListCell   *lc;
	char	   *token;
	const char *token_problem;

	if (batches == NIL)
		return;
	token_problem = sm_endpoint_token(sm_auth_token_file, &token);
	foreach(lc, batches)
	{
		SmBatch    *batch = lfirst(lc);

		const char *problem = token_problem ? token_problem : submit(batch, token);

		batch->branch->force = false;
		if (problem == NULL)
		{
			in_flight++;
			continue;
		}
		batch->branch->in_flight = NULL;
		sm_delivery_begin();
		sm_answer_unsendable(batch, problem);
		sm_session_commit();
	}
}

/* --- answers --- */

/*
 * The batch that would be sent next were everything looked at anew, if that is
 * certain; else NULL.
 */
static SmBatch *
find_follower(const SmBranch *branch, const SmBatch *before, TimestampTz now)
{
	ListCell   *lc;

	foreach(lc, branch->lanes)
	{
		SmLane	   *lane = lfirst(lc);
		ListCell   *cell;

		foreach(cell, lane->queue)
		{
			SmBatch    *batch = lfirst(cell);

			if (batch == before)
				continue;
			/* What was refused or failed before has rules of its own; and so has what stands behind it. */
			if (!batch->built || batch->ready_at == 0 || batch->n == 0 || batch->parked || batch->refused_at >= 0 || batch->attempt_count > 0 ||
				lane->not_before > now || TimestampDifferenceExceeds(batch->ready_at, now, READY_MS))
				return NULL;
			return batch;
		}
	}
	return NULL;
}

/*
 * Sends what follows a batch that was accepted, before that one is settled: central
 * need not wait for it.  Only if the branch has nothing else to do that a batch on
 * its way would hold up.  Within a transaction, as receipts may have to be converted
 * to the server's encoding.
 */
static void
send_follower(SmBatch *accepted, const SmHttpResult *result)
{
	SmBranch   *branch = accepted->branch;
	TimestampTz now = GetCurrentTimestamp();
	SmBatch    *batch;
	char	   *token;

	if (!may_send_another(branch, now) || accepted->refused_at >= 0)
		return;
	batch = find_follower(branch, accepted, now);
	/* The receipt is read twice only where that spares central a wait. */
	if (batch == NULL || batch->endpoint != branch->endpoint || !sm_answer_accepts_all(accepted, result))
		return;
	if (sm_endpoint_token(sm_auth_token_file, &token) != NULL || submit(batch, token) != NULL)
		return;					/* the next pass finds the same problem, and reports it */
	branch->in_flight = batch;
	in_flight++;
	sm_http_run();
}

static bool
take_answers(void)
{
	SmHttpResult result;
	bool		any = false;

	sm_http_run();
	while (sm_http_next_result(&result))
	{
		any = true;
		if (!sm_probe_handle(&result))
		{
			in_flight--;
			sm_delivery_begin();
			send_follower(result.tag, &result);
			sm_answer_handle(result.tag, &result);
			sm_session_commit();
			sm_http_run();
		}
	}
	return any;
}

/* --- the pass --- */

/* Branches met in rows that somebody was just registering, who may yet roll back. */
static List *undiscovered = NIL;

/* Registers branches met in rows for the first time; true when there were any. */
static bool
discover_branches(void)
{
	List	   *branches = NIL;
	List	   *left;
	ListCell   *lc;
	MemoryContext caller;

	foreach(lc, undiscovered)
		branches = lappend(branches, pstrdup(lfirst(lc)));
	foreach(lc, sm_delivery_unregistered)
		sm_reading_discover(lfirst(lc), &branches);
	if (branches == NIL)
		return false;
	left = sm_outbox_register(branches);
	list_free_deep(undiscovered);
	undiscovered = NIL;
	caller = MemoryContextSwitchTo(sm_delivery_cxt);
	foreach(lc, left)
		undiscovered = lappend(undiscovered, pstrdup(lfirst(lc)));
	MemoryContextSwitchTo(caller);
	return list_length(left) < list_length(branches);
}

/* A new generation of lanes where this database may use numbers twice. */
void
sm_delivery_check_identity(void)
{
	char	   *why;

	sm_delivery_begin();
	sm_outbox_abandon_sessions();
	why = sm_outbox_check_identity();
	if (why != NULL)
	{
		sm_outbox_open_epoch(why);
		ereport(LOG,
				(errmsg("softmobile: opened a new epoch: this is %s", why)));
	}
	sm_outbox_commit_durably();
}

/*
 * Could an event that is committed now be sent?  When not, since the link is down
 * or a batch is on its way, the next pass does not wait for it: it waits for an
 * answer, a timer or a request.
 */
static bool
could_send(void)
{
	TimestampTz now = GetCurrentTimestamp();
	ListCell   *lc;

	foreach(lc, sm_delivery_branches)
		if (may_send(lfirst(lc), now))
			return true;
	return false;
}

static void
lanes_set_back(List *lanes, int64 us)
{
	ListCell   *lc;

	foreach(lc, lanes)
		((SmLane *) lfirst(lc))->not_before -= us;
}

/*
 * Everything here is due by the clock of the day, as people see it in the views.
 * When that is set back, nobody shall wait until it has caught up: what was to be
 * done is due that much earlier.  What becomes due too early does no harm.
 */
static void
follow_clock(TimestampTz now)
{
	static TimestampTz latest = 0;
	int64		us = latest - now;
	ListCell   *lc;

	latest = now;
	if (us <= 0)
		return;
	sm_endpoint_set_back(now, us);
	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);

		branch->not_before -= us;
		branch->verify_at -= us;
		if (branch->requeue_at != 0)
			branch->requeue_at -= us;
		if (branch->next_exception != 0)
			branch->next_exception -= us;
		branch->session_started = Min(branch->session_started, now);
		lanes_set_back(branch->lanes, us);
	}
}

/* Returns true when another pass should follow at once. */
bool
sm_delivery_pass(void)
{
	TimestampTz now = GetCurrentTimestamp();
	List	   *batches;
	List	   *followers = NIL;
	TransactionId xmin;
	ListCell   *lc;
	SmRequestTicket ticket;
	bool		again;

	follow_clock(now);
	again = take_answers();
	now = GetCurrentTimestamp();

	sm_delivery_begin();
	if (sm_outbox_lanes_changed() || (sm_registry_again_at() != 0 && sm_registry_again_at() <= now))
	{
		sm_registry_reload();
		again = true;
	}
	sm_requeue_apply_requests();
	again |= discover_branches();
	sm_requeue_due(now);
	while (sm_request_take(MyDatabaseId, &ticket))
		sm_requeue_take_run(&ticket);
	sm_link_publish();
	sm_session_commit();

	sm_delivery_begin();
	xmin = GetActiveSnapshot()->xmin;
	check_horizon(xmin);
	batches = pick_batches(now, &followers, &again);
	if (snapshots_left || batches == NIL)
		snapshots_left = sm_outbox_snapshot_step();
	sm_session_commit();
	flush_for(list_concat_copy(batches, followers), xmin);
	foreach(lc, followers)
		((SmBatch *) lfirst(lc))->ready_at = now;
	submit_batches(batches);
	sm_probe_send_due(now);
	if (!could_send())
		sm_shmem_ignore_events();
	/* while these are on their way, what follows them is put together */
	return again || snapshots_left || batches != NIL;
}

static TimestampTz
earlier(TimestampTz a, TimestampTz b)
{
	return b != 0 && b < a ? b : a;
}

/* When a lane's open gaps have to be looked at again; 0: there are none. */
static TimestampTz
next_look(const SmLane *lane, TimestampTz now)
{
	if (lane->stalled || sm_gaps_pressing(&lane->gaps))
		return TimestampTzPlusMilliseconds(now, PRESSING_MS);
	return lane->gaps.groups != NIL ? TimestampTzPlusMilliseconds(now, OPEN_GAP_MS) : 0;
}

/* How long the worker may wait for the next pass if nothing happens. */
long
sm_delivery_timeout_ms(void)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz next = TimestampTzPlusMilliseconds(now, IDLE_MS);
	ListCell   *lc;

	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);
		ListCell   *cell;

		if (branch->endpoint == NULL || !branch->active || branch->in_flight != NULL)
			continue;
		next = earlier(next, branch->requeue_at);
		next = earlier(next, branch->next_exception);
		if (branch->endpoint->down && !branch->endpoint->probing)
			next = earlier(next, branch->endpoint->next_probe);
		if (branch->not_before > now)
			next = earlier(next, branch->not_before);
		if (branch->verify == SM_VERIFY_DONE)
			next = earlier(next, branch->verify_at);
		if (branch->held)		/* the token file is looked at */
			next = earlier(next, TimestampTzPlusMilliseconds(now, HELD_MS));
		foreach(cell, branch->lanes)
		{
			SmLane	   *lane = lfirst(cell);

			if (lane->not_before > now)
				next = earlier(next, lane->not_before);
			if (!branch->endpoint->down)
				next = earlier(next, next_look(lane, now));
		}
	}
	next = earlier(next, sm_registry_again_at());
	foreach(lc, sm_delivery_unregistered)
		next = earlier(next, next_look(lfirst(lc), now));
	if (undiscovered != NIL)
		next = earlier(next, TimestampTzPlusMilliseconds(now, OPEN_GAP_MS));
	return TimestampDifferenceMilliseconds(now, next);
}

/* A new token: what was held for the old one is tried at once. */
void
sm_delivery_token_changed(void)
{
	ListCell   *lc;

	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);

		if (!branch->held)
			continue;
		branch->held = false;
		branch->not_before = 0;
	}
}
