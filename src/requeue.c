/*
 * requeue.c
 *		What is tried again, and when: failed batches and exceptions whose time has
 *		come, what users have asked for, and everything when the link is back.
 *
 * Called by delivery.c and answer.c within sm_outbox_begin() and its commit.
 * Users' wishes are read from outbox_request, those of sync_run() from shared
 * memory; either way the worker carries them out, as the only writer of lanes.
 */
#include "postgres.h"

#include "delivery.h"
#include "guc.h"
#include "miscadmin.h"
#include "outbox.h"
#include "request.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

/* Requeues the failed batches of a branch; returns how many events that are. */
static int64
requeue_branch(SmBranch *branch)
{
	int64		events = 0;
	ListCell   *lc;

	foreach(lc, branch->lanes)
	{
		SmLane	   *lane = lfirst(lc);
		ListCell   *cell;

		if (!lane->failed)
			continue;
		sm_outbox_requeue(lane->lane_id);
		lane->failed = false;
		lane->not_before = 0;
		foreach(cell, lane->queue)
		{
			SmBatch    *batch = lfirst(cell);

			if (batch->attempt_count > 0)
				events += sm_ranges_count(&batch->members);
			batch->attempt_count = 0;
			batch->first_attempt_at = batch->last_attempt_at = 0;
		}
	}
	branch->requeue_at = 0;
	branch->not_before = 0;
	branch->failures = 0;
	branch->held = false;
	return events;
}

static void
requeue_automatically(SmBranch *branch, const char *why)
{
	int64		events = requeue_branch(branch);

	if (events > 0)
		sm_outbox_audit_requeue(branch->id, events, why);
}

/* The link is up again: what failed for it goes at once. */
void
sm_requeue_link_back(SmEndpoint *endpoint)
{
	ListCell   *lc;

	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);

		if (branch->endpoint != endpoint)
			continue;
		branch->line = (SmLineRates) {0};	/* it may be another line */
		if (branch->in_flight == NULL)
			requeue_automatically(branch, "the link is back");
	}
}

/* Batches and exceptions whose automatic retry is due. */
void
sm_requeue_due(TimestampTz now)
{
	ListCell   *lc;

	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);

		if (branch->in_flight != NULL)
			continue;
		if (branch->requeue_at != 0 && branch->requeue_at <= now)
		{
			requeue_automatically(branch, "the retry interval has passed");
			branch->force = true;
		}
		if (branch->next_exception != 0 && branch->next_exception <= now)
		{
			int64		events = sm_outbox_requeue_exceptions(branch->id, -1);

			if (events > 0)
				sm_outbox_audit_requeue(branch->id, events, "the retry interval has passed");
			branch->next_exception = sm_outbox_next_exception(branch->id);
			branch->exceptions_idle = false;
		}
	}
}

static void
apply_requeue(const SmRequestRow *row)
{
	ListCell   *lc;

	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);

		if (row->branch != NULL && strcmp(row->branch, branch->id) != 0)
			continue;
		(void) sm_outbox_requeue_exceptions(branch->id, row->min_age_us);
		branch->exceptions_idle = false;
		if (branch->in_flight == NULL)
			(void) requeue_branch(branch);
		branch->force = true;
	}
}

/* Retry of certain events: exceptions among them, and the batches that hold the rest. */
static void
apply_retry(const SmRequestRow *row)
{
	ListCell   *lc;

	(void) sm_outbox_retry_exceptions(row->ids);
	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);

		branch->exceptions_idle = false;
		if (branch->in_flight == NULL && sm_outbox_batch_holds(branch->id, row->ids))
		{
			(void) requeue_branch(branch);
			branch->force = true;
		}
	}
}

static void
apply_resend(const SmRequestRow *row)
{
	SmRanges	seqs = sm_outbox_resend(row->lane_id, &row->seqs);
	ListCell   *lc;

	if (seqs.n == 0)
		return;

	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);
		ListCell   *cell;

		foreach(cell, branch->lanes)
		{
			SmLane	   *lane = lfirst(cell);

			if (lane->lane_id != row->lane_id)
				continue;
			(void) sm_batch_restore(lane, &seqs);
			return;
		}
	}
	/* A lane that was closed is open again, and read from its first number that is not settled. */
	sm_outbox_lanes_stale();
}

/* A decided conflict goes next; what waits behind it follows. */
static void
apply_resolve(const SmRequestRow *row)
{
	SmBranch   *branch = sm_registry_find(row->branch);

	sm_outbox_resolve_conflict(row->ids, row->resolution, row->adoption);
	if (branch != NULL)
		branch->exceptions_idle = false;
}

void
sm_requeue_apply_requests(void)
{
	List	   *rows = sm_outbox_take_requests();
	ListCell   *lc;

	foreach(lc, rows)
	{
		SmRequestRow *row = lfirst(lc);

		if (strcmp(row->kind, "requeue") == 0)
			apply_requeue(row);
		else if (strcmp(row->kind, "retry") == 0)
			apply_retry(row);
		else if (strcmp(row->kind, "resolve") == 0)
			apply_resolve(row);
		else
			apply_resend(row);
	}
}

/* A sync_run(): everything of the branch is tried now, in a session of its own. */
void
sm_requeue_take_run(const SmRequestTicket *taken)
{
	SmBranch   *branch = sm_registry_find(taken->branch);
	SmRequestTicket *ticket = MemoryContextAlloc(sm_delivery_cxt, sizeof(SmRequestTicket));
	MemoryContext caller;
	ListCell   *lc;

	*ticket = *taken;
	if (branch == NULL || !branch->active)
	{
		sm_session_finish(ticket, 0, branch == NULL ? "the branch is not registered" : "the branch is not active");
		return;
	}
	if (!branch->manual)
	{
		sm_session_end(branch, branch->session_error);
		sm_session_open(branch, true, ticket->user, ticket->reason);
	}
	caller = MemoryContextSwitchTo(sm_delivery_cxt);
	branch->tickets = lappend(branch->tickets, ticket);
	MemoryContextSwitchTo(caller);
	sm_request_running(ticket, branch->session);
	branch->force = true;
	branch->not_before = 0;
	branch->checked = false;
	branch->exceptions_idle = false;
	foreach(lc, branch->lanes)
		((SmLane *) lfirst(lc))->not_before = 0;
	if (branch->endpoint == NULL)
		sm_session_end(branch, "softmobile.central_url is not set");
}
