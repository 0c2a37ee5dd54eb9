/*
 * registry.c
 *		The worker's branches and lanes, as the tables have them.
 *
 * Read at the worker's start and whenever lanes_changed() told so.  What is
 * already known keeps its state; what is new starts from the tables, which hold
 * all that a former worker achieved.
 */
#include "postgres.h"

#include "delivery.h"
#include "guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

List	   *sm_delivery_branches = NIL;
List	   *sm_delivery_unregistered = NIL;

/* How soon to look again whether a restore is over (ms). */
#define RESTORE_MS	1000

static TimestampTz again_at = 0;	/* 0: no lane was left out */

SmBranch *
sm_registry_find(const char *id)
{
	ListCell   *lc;

	foreach(lc, sm_delivery_branches)
		if (strcmp(((SmBranch *) lfirst(lc))->id, id) == 0)
			return lfirst(lc);
	return NULL;
}

static void
refresh_branch(const SmBranchRow *row)
{
	SmBranch   *branch = sm_registry_find(row->branch);
	const char *url = row->central_url ? row->central_url : sm_central_url;
	SmEndpoint *endpoint = url[0] == '\0' ? NULL : sm_endpoint_find(url);

	if (branch == NULL)
	{
		branch = palloc0(sizeof(SmBranch));
		branch->id = pstrdup(row->branch);
		branch->max_events = Min(SM_USUAL_EVENTS, sm_batch_max_events);
		branch->next_exception = sm_outbox_next_exception(row->branch);
		sm_delivery_branches = lappend(sm_delivery_branches, branch);
	}
	branch->active = row->active;
	branch->receipts = row->receipts;
	if (branch->endpoint != endpoint)
		branch->line = (SmLineRates) {0};	/* it is another line */
	branch->endpoint = endpoint;
	branch->not_before = 0;
}

static SmLane *
find_lane(List *lanes, int lane_id)
{
	ListCell   *lc;

	foreach(lc, lanes)
		if (((SmLane *) lfirst(lc))->lane_id == lane_id)
			return lfirst(lc);
	return NULL;
}

static void
add_skips(SmLane *lane, const SmRanges *done)
{
	for (int i = 0; i < done->n; i++)
		sm_ranges_add(&lane->skip, done->range[i].lo, done->range[i].hi);
}

/* A lane that this worker has not served yet. */
static SmLane *
adopt_lane(const SmLaneRow *row, SmBranch *branch)
{
	SmLane	   *lane = palloc0(sizeof(SmLane));

	lane->lane_id = row->lane_id;
	lane->log_id = row->log_id;
	lane->epoch_no = row->epoch_no;
	strlcpy(lane->epoch, row->epoch, sizeof(lane->epoch));
	lane->priority = row->priority;
	lane->seqrelid = row->seqrelid;
	lane->branch = branch;
	lane->folded = row->folded;
	lane->gaps.cxt = sm_delivery_cxt;
	add_skips(lane, &row->settled);

	if (row->batch.n > 0)
	{
		SmRanges	left = sm_ranges_minus(&row->batch, &row->settled);

		lane->marked = true;
		lane->failed = row->failed;
		if (left.n > 0)
		{
			SmBatch    *batch = sm_batch_restore(lane, &left);

			batch->attempt_count = row->attempt_count;
			batch->first_attempt_at = row->first_attempt_at;
			batch->last_attempt_at = row->last_attempt_at;
			add_skips(lane, &left);
			/* An attempt in the future was made under a clock that has been set back. */
			if (row->failed && branch != NULL && branch->requeue_at == 0)
				branch->requeue_at = TimestampTzPlusMilliseconds(Min(row->last_attempt_at, GetCurrentTimestamp()),
																 sm_retry_interval * INT64CONST(1000));
		}
	}
	if (lane->skip.n > 0 && lane->skip.range[0].lo <= 1)
		lane->cursor = lane->skip.range[0].hi - 1;
	return lane;
}

/*
 * The lane as this worker knows it, or as it begins to serve it.  NULL: not while
 * a dump is being restored here.  A segment of the log that is yet to come would
 * look like numbers that were rolled back, an older lane like none.
 */
static SmLane *
take_lane(List *known, const SmLaneRow *row, SmBranch *branch)
{
	SmLane	   *lane = find_lane(known, row->lane_id);

	if (lane != NULL)
		return lane;
	if (again_at != 0 || sm_outbox_restore_runs())
	{
		again_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), RESTORE_MS);
		return NULL;
	}
	return adopt_lane(row, branch);
}

/* When to reload though nobody said that anything has changed; 0: need not be. */
TimestampTz
sm_registry_again_at(void)
{
	return again_at;
}

void
sm_registry_reload(void)
{
	List	   *branches = sm_outbox_branches();
	List	   *lanes = sm_outbox_lanes();
	MemoryContext caller = MemoryContextSwitchTo(sm_delivery_cxt);
	ListCell   *lc;

	again_at = 0;
	foreach(lc, branches)
		refresh_branch(lfirst(lc));

	/* Lanes come in the order of service, and are put in that order again. */
	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);
		List	   *known = branch->lanes;
		ListCell   *row;

		branch->lanes = NIL;
		foreach(row, lanes)
		{
			SmLaneRow  *lane_row = lfirst(row);
			SmLane	   *lane;

			if (lane_row->branch == NULL || strcmp(lane_row->branch, branch->id) != 0)
				continue;
			lane = take_lane(known, lane_row, branch);
			if (lane != NULL)
				branch->lanes = lappend(branch->lanes, lane);
		}
		list_free(known);
	}
	foreach(lc, lanes)
	{
		SmLaneRow  *row = lfirst(lc);
		SmLane	   *lane;

		if (row->branch != NULL || find_lane(sm_delivery_unregistered, row->lane_id) != NULL)
			continue;
		lane = take_lane(NIL, row, NULL);
		if (lane != NULL)
			sm_delivery_unregistered = lappend(sm_delivery_unregistered, lane);
	}
	MemoryContextSwitchTo(caller);
}
