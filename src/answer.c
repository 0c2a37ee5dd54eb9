/*
 * answer.c
 *		What becomes of a batch when its answer is there.
 *
 * The whole of CONTRACT's answer table is decide(); the rest carries its decision
 * out.  A failed delivery is data: it is written to the lane's row and to the
 * session, in one short transaction, and nothing is thrown.
 */
#include "postgres.h"

#include "answer.h"
#include "delivery.h"
#include "guc.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

/* Waits after failures that end by themselves. */
#define FIRST_BACKOFF_MS		1000
#define LAST_BACKOFF_MS			60000

/* Single events refused in a row, with none accepted, before the batch fails as a whole. */
#define MAX_PARKED				8

/* Requests that make the next batch smaller: they took long; or larger: they brought so much more. */
#define SLOW_REQUEST_MS			5000
#define LEAST_EVENTS			25
#define BETTER_RATE				1.05
#define RATED_REQUESTS			2

typedef enum Decision
{
	DECIDE_SETTLE,				/* the receipt (or an empty 2xx) settles it */
	DECIDE_OFFLINE,				/* the link is down: probe it */
	DECIDE_LATER,				/* fails, tried again after a while */
	DECIDE_HOLD,				/* fails, tried again at the retry interval or with a new token */
	DECIDE_HALVE,				/* too large */
	DECIDE_UNCOMPRESSED,		/* once more without compression */
	DECIDE_BISECT				/* some event in it is refused */
} Decision;

typedef struct Answer
{
	Decision	decision;
	SmReceipt	receipt;
	char	   *error;
	int64		retry_after_ms; /* -1: none given */
} Answer;

/* "http NNN: detail" */
static char *
http_error(const SmHttpResult *result)
{
	char	   *detail = sm_wire_problem(result->body, result->body_len, result->content_type);

	if (detail != NULL && detail[0] != '\0')
		return psprintf("http %ld: %s", result->status, detail);
	return psprintf("http %ld: no detail given", result->status);
}

static int
compare_verdicts(const void *a, const void *b)
{
	return ((const SmEventVerdict *) a)->event - ((const SmEventVerdict *) b)->event;
}

static void
decide_success(const SmBatch *batch, const SmHttpResult *result, Answer *answer)
{
	answer->decision = DECIDE_SETTLE;
	if (result->body_len == 0 && !batch->branch->receipts)
	{
		answer->receipt.accepted = batch->n;
		return;
	}
	if (sm_wire_receipt(result->body, result->body_len, batch->events, batch->n, &answer->receipt))
	{
		/* An entity's first one is what its others wait for. */
		if (answer->receipt.nverdicts > 1)
			qsort(answer->receipt.verdicts, answer->receipt.nverdicts, sizeof(SmEventVerdict), compare_verdicts);
		return;
	}
	answer->decision = DECIDE_LATER;
	answer->error = psprintf("protocol: %s", answer->receipt.error);
}

static void
decide_status(const SmBatch *batch, const SmHttpResult *result, Answer *answer)
{
	answer->error = http_error(result);
	switch (result->status)
	{
		case 400:
		case 422:
			answer->decision = DECIDE_BISECT;
			break;
		case 408:
		case 409:
		case 425:
		case 429:
			answer->decision = DECIDE_LATER;
			break;
		case 413:
			answer->decision = DECIDE_HALVE;
			break;
		case 415:
			answer->decision = sm_wire_encoding(&batch->body) != NULL ? DECIDE_UNCOMPRESSED : DECIDE_LATER;
			break;
		default:
			answer->decision = result->status >= 500 ? DECIDE_LATER : DECIDE_HOLD;
			break;
	}
}

/* CONTRACT's answer table. */
static void
decide(const SmBatch *batch, const SmHttpResult *result, Answer *answer)
{
	answer->retry_after_ms = result->retry_after_ms;
	switch (result->outcome)
	{
		case SM_HTTP_OFFLINE:
			answer->decision = DECIDE_OFFLINE;
			answer->error = "offline";
			break;
		case SM_HTTP_TLS:
			answer->decision = DECIDE_LATER;
			answer->error = psprintf("tls: %s", result->error);
			break;
		case SM_HTTP_PROTOCOL:
			answer->decision = DECIDE_LATER;
			answer->error = psprintf("protocol: %s", result->error);
			break;
		case SM_HTTP_UNUSABLE:
			answer->decision = DECIDE_HOLD;
			answer->error = psprintf("configuration: %s", result->error);
			break;
		case SM_HTTP_ANSWERED:
			if (result->status >= 200 && result->status < 300)
				decide_success(batch, result, answer);
			else if (result->status >= 400 && result->status < 600)
				decide_status(batch, result, answer);
			else
			{
				answer->decision = DECIDE_LATER;
				answer->error = psprintf("protocol: http %ld is neither a receipt nor an error%s", result->status,
										 result->status / 100 == 3 ? "; redirects are not followed" : "");
			}
			break;
	}
}

/* A receipt after which what follows may go as it was built: no event was refused. */
bool
sm_answer_accepts_all(const SmBatch *batch, const SmHttpResult *result)
{
	Answer		answer = {0};

	decide(batch, result, &answer);
	return answer.decision == DECIDE_SETTLE && answer.receipt.nverdicts == 0;
}

static const char *
verdict_error(const SmEventVerdict *verdict)
{
	const char *what = verdict->conflict ? "conflict" : "rejected";

	return verdict->detail[0] != '\0' ? psprintf("%s: %s", what, verdict->detail) : what;
}

/*
 * An event whose entity has an exception before it waits for that one, whatever
 * central says of it: it could not be right without the first.
 */
static bool
record_follower(SmBatch *batch, int i)
{
	SmLane	   *lane = batch->lane;
	const SmBlockedEntity *earlier;
	SmExceptionRow row = {.kind = "waiting"};

	if (lane == NULL)
		return false;
	earlier = sm_batch_blocked(batch->branch, batch->entity_nos[i], batch->events[i].entity_id);
	if (earlier == NULL)
		return false;
	row.waits_for = &earlier->exception;
	row.error_message = psprintf("waits for %s", DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&earlier->exception))));
	sm_outbox_add_exception(lane->lane_id, lane->log_id, &row, batch->events[i].seq, batch->branch->id);
	return true;
}

/* An event that central answered one by one. */
static void
record_verdict(SmBatch *batch, int i, const char *kind, const char *error, const char *current)
{
	SmLane	   *lane = batch->lane;
	const SmEvent *event = &batch->events[i];
	TimestampTz now = GetCurrentTimestamp();
	SmExceptionRow row = {.kind = kind, .error_message = error, .central_row = current, .last_attempt_at = now};

	if (record_follower(batch, i))
		return;
	row.attempt_count = 1 + (batch->attempts ? batch->attempts[i] : 0);
	if (strcmp(kind, "rejected") == 0 && row.attempt_count < sm_max_attempts)
		row.next_attempt_at = TimestampTzPlusMilliseconds(now, sm_retry_interval * INT64CONST(1000));
	if (row.next_attempt_at != 0 &&
		(batch->branch->next_exception == 0 || row.next_attempt_at < batch->branch->next_exception))
		batch->branch->next_exception = row.next_attempt_at;
	if (lane == NULL)
	{
		sm_outbox_exception_failed(&event->id, &row);
		return;
	}
	sm_outbox_add_exception(lane->lane_id, lane->log_id, &row, event->seq, batch->branch->id);
	sm_batch_block(batch->branch, batch->entity_nos[i], event->entity_id, &event->id);
	sm_batch_unbuild_others(batch->branch, batch);
}

/* Events of a batch of exceptions that central took. */
static void
deliver_exceptions(SmBatch *batch, const SmReceipt *receipt)
{
	bool	   *refused = palloc0(sizeof(bool) * batch->n);

	for (int v = 0; v < receipt->nverdicts; v++)
		refused[receipt->verdicts[v].event] = true;
	for (int i = 0; i < batch->n; i++)
		if (!refused[i])
			sm_outbox_exception_delivered(&batch->events[i].id);
	sm_batch_forget_blocked(batch->branch);
	batch->branch->max_exceptions *= 2;
	if (batch->branch->max_exceptions >= batch->branch->max_events)
		batch->branch->max_exceptions = 0;

	/* What was built before has put later events aside, behind what is delivered now. */
	sm_batch_unbuild_others(batch->branch, batch);
}

/* With no failed batch left there is nothing to requeue. */
static void
forget_requeue(SmBranch *branch)
{
	ListCell   *lc;

	foreach(lc, branch->lanes)
		if (((SmLane *) lfirst(lc))->failed)
			return;
	branch->requeue_at = 0;
	branch->held = false;
}

/* True when nothing else of the lane's failed batch is left in its queue. */
static bool
is_all_that_failed(const SmBatch *batch)
{
	ListCell   *lc;

	foreach(lc, batch->lane->queue)
	{
		const SmBatch *other = lfirst(lc);

		if (other != batch && (other->attempt_count > 0 || other->refused_at >= 0))
			return false;
	}
	return true;
}

static void
write_ledger_row(SmBatch *batch, const SmReceipt *receipt, int exceptions)
{
	SmLane	   *lane = batch->lane;
	SmSettlement settlement = {
		.lane_id = lane->lane_id,
		.members = &batch->members,
		.idempotency_key = batch->key,
		.events = batch->n,
		.attempt_count = batch->attempt_count,
		.first_attempt_at = batch->first_attempt_at,
		.last_attempt_at = batch->last_attempt_at,
		.accepted = receipt->accepted,
		.duplicates = receipt->duplicates,
		.exceptions = exceptions,
		.session_id = batch->branch->session,
	};

	/* The set is rewritten whole: only while it is short. */
	settlement.fold = sm_gaps_count(&lane->gaps) + list_length(lane->queue) <= 64;
	settlement.whole = lane->marked && is_all_that_failed(batch);
	sm_outbox_settle(&settlement);
	lane->folded = settlement.fold;
	if (settlement.whole)
		lane->marked = lane->failed = false;
	forget_requeue(batch->branch);
}

/* Refused single events are exceptions once another one has been accepted. */
static void
settle_parked(SmBranch *branch, const SmEndpoint *endpoint)
{
	ListCell   *lc;

	foreach(lc, branch->lanes)
	{
		SmLane	   *lane = lfirst(lc);
		List	   *queue = list_copy(lane->queue);
		ListCell   *cell;

		foreach(cell, queue)
		{
			SmBatch    *parked = lfirst(cell);
			SmReceipt	none = {0};

			if (!parked->parked || parked->refused_at >= endpoint->accepted)
				continue;
			sm_batch_settle_asides(parked);
			record_verdict(parked, 0, "rejected", parked->refusal, NULL);
			write_ledger_row(parked, &none, 1 + list_length(parked->asides));
			sm_outbox_progress(branch->session, 0, 1);
			sm_batch_free(parked);
		}
		list_free(queue);
	}
}

/* The line has become slow: what it showed before says nothing about it now. */
static void
carry_less(SmBranch *branch)
{
	branch->max_events = Max(LEAST_EVENTS, branch->max_events / 2);
	branch->line = (SmLineRates) {0};
}

/*
 * How many events the next request may carry.  A line with a long round trip is
 * used well only by requests that take long themselves; where the round trip is
 * short, large ones bring nothing, and cost memory at both ends.  So twice as many
 * events are tried, and kept if they go clearly faster.  The best of a few requests
 * counts: one that met a cold cache or a busy machine says nothing about the line.
 */
static void
adapt_size(SmBranch *branch, const SmBatch *batch, const SmHttpResult *result)
{
	SmLineRates *line = &branch->line;
	int			ceiling = line->ceiling > 0 ? Min(line->ceiling, sm_batch_max_events) : sm_batch_max_events;

	if (result->total_ms > SLOW_REQUEST_MS)
		carry_less(branch);
	else if (batch->n >= branch->max_events && branch->max_events < Min(SM_USUAL_EVENTS, ceiling))
		branch->max_events = Min(branch->max_events * 2, ceiling);
	else if (batch->n >= branch->max_events)
	{
		line->requests++;
		line->rate = Max(line->rate, batch->n / Max(result->total_ms, 1.0));
		if (line->rate > line->rate_of_half * BETTER_RATE)
		{
			/* Less than twice as many could not be compared, half of them would be another size, and twice as many shall not be too slow. */
			if (line->requests >= RATED_REQUESTS && branch->max_events * 2 <= ceiling && result->total_ms * 2 <= SLOW_REQUEST_MS)
			{
				branch->max_events *= 2;
				*line = (SmLineRates) {.rate_of_half = line->rate, .ceiling = line->ceiling};
			}
		}
		else if (line->requests >= 2 * RATED_REQUESTS)
		{
			branch->max_events /= 2;
			*line = (SmLineRates) {.rate = line->rate_of_half, .ceiling = branch->max_events};
		}
	}
	branch->max_events = Min(branch->max_events, sm_batch_max_events);
}

static void
settle(SmBatch *batch, const SmHttpResult *result, const SmReceipt *receipt)
{
	SmBranch   *branch = batch->branch;
	SmEndpoint *endpoint = batch->endpoint;

	if (batch->lane)
		sm_batch_settle_asides(batch);
	for (int v = 0; v < receipt->nverdicts; v++)
	{
		const SmEventVerdict *verdict = &receipt->verdicts[v];

		record_verdict(batch, verdict->event, verdict->conflict ? "conflict" : "rejected",
					   verdict_error(verdict), verdict->current);
	}
	if (batch->lane)
		write_ledger_row(batch, receipt, receipt->nverdicts + list_length(batch->asides));
	else
		deliver_exceptions(batch, receipt);
	branch->failures = 0;
	sm_outbox_progress(branch->session, receipt->accepted + receipt->duplicates, receipt->nverdicts);

	endpoint->accepted += receipt->accepted + receipt->duplicates;
	if (batch->lane)
		batch->lane->not_before = 0;
	adapt_size(branch, batch, result);
	sm_batch_free(batch);
	settle_parked(branch, endpoint);
}

/* Writes a failed attempt: the lane's row. */
static void
mark_failed(SmBatch *batch, const char *error, TimestampTz next)
{
	SmLane	   *lane = batch->lane;

	if (lane == NULL)
		return;
	sm_outbox_fail(lane->lane_id, &batch->members, batch->key, batch->attempt_count,
				   batch->first_attempt_at, batch->last_attempt_at, next, error);
	lane->marked = lane->failed = true;
}

static void
note_session_error(SmBranch *branch, const char *error)
{
	if (branch->session_error)
		pfree(branch->session_error);
	branch->session_error = MemoryContextStrdup(sm_delivery_cxt, error);
}

/* The whole branch has to wait: what failed one batch would fail the next. */
static void
fail_branch(SmBatch *batch, const Answer *answer)
{
	SmBranch   *branch = batch->branch;
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz retry = TimestampTzPlusMilliseconds(now, sm_retry_interval * INT64CONST(1000));
	TimestampTz next;

	if (answer->decision == DECIDE_HOLD)
	{
		next = retry;
		branch->held = true;
	}
	else if (answer->retry_after_ms >= 0)
		next = TimestampTzPlusMilliseconds(now, answer->retry_after_ms);
	else
		next = sm_endpoint_backoff(branch->failures, FIRST_BACKOFF_MS,
								   Min(LAST_BACKOFF_MS, sm_retry_interval * 1000));
	branch->failures++;
	branch->not_before = next;
	if (branch->requeue_at == 0)
		branch->requeue_at = retry;
	branch->requeue_at = Max(branch->requeue_at, next);
	if (answer->decision == DECIDE_OFFLINE)
		sm_endpoint_failed(batch->endpoint);
	mark_failed(batch, answer->error, next);
	note_session_error(branch, answer->error);
	sm_session_end(branch, answer->error);
	sm_batch_unbuild_others(branch, batch);
	if (batch->lane == NULL)
		sm_batch_free(batch);	/* its exceptions stay queued */
	else
		sm_batch_unbuild(batch);
}

/* No event of what was refused has been shown to be at fault: all of it waits. */
static void
fail_refused(SmLane *lane, const char *error)
{
	SmBranch   *branch = lane->branch;
	SmBatch    *whole = NULL;
	SmBatch    *merged;
	SmRanges	members = {0};
	List	   *queue = list_copy(lane->queue);
	ListCell   *lc;

	foreach(lc, queue)
	{
		SmBatch    *part = lfirst(lc);

		if (part->refused_at < 0)
			continue;
		if (whole == NULL)
			whole = part;
		for (int i = 0; i < part->members.n; i++)
			sm_ranges_add(&members, part->members.range[i].lo, part->members.range[i].hi);
	}
	if (whole == NULL)
		return;
	merged = sm_batch_restore(lane, &members);
	merged->attempt_count = whole->attempt_count;
	merged->first_attempt_at = whole->first_attempt_at;
	merged->last_attempt_at = GetCurrentTimestamp();
	merged->refused_at = whole->refused_at;
	strlcpy(merged->key, whole->key, sizeof(merged->key));
	foreach(lc, queue)
		if (((SmBatch *) lfirst(lc))->refused_at >= 0)
			sm_batch_free(lfirst(lc));
	sm_batch_to_front(merged);

	lane->not_before = sm_endpoint_backoff(merged->attempt_count, FIRST_BACKOFF_MS, sm_probe_interval * 1000);
	if (branch->requeue_at == 0)
		branch->requeue_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), sm_retry_interval * INT64CONST(1000));
	mark_failed(merged, error, lane->not_before);
	note_session_error(branch, error);
}

/* Exceptions are in no lane's order: fewer of them go next, and one alone is at fault. */
static void
halve_exceptions(SmBatch *batch, const char *error)
{
	SmBranch   *branch = batch->branch;

	if (batch->n > 1)
		branch->max_exceptions = batch->n / 2;
	else
	{
		record_verdict(batch, 0, "rejected", error, NULL);
		sm_outbox_progress(branch->session, 0, 1);
	}
	sm_batch_free(batch);
}

/* 400 and 422: find out which event it is. */
static void
bisect(SmBatch *batch, const char *error)
{
	SmBranch   *branch = batch->branch;
	SmLane	   *lane = batch->lane;
	int			parked = 0;
	ListCell   *lc;

	if (lane == NULL)
	{
		halve_exceptions(batch, error);
		return;
	}
	if (batch->refused_at < 0)
		batch->refused_at = batch->endpoint->accepted;
	if (batch->n > 1)
	{
		sm_batch_split(batch);
		return;
	}
	batch->refusal = MemoryContextStrdup(batch->cxt, error);
	batch->parked = true;
	sm_batch_unbuild_others(branch, batch);
	if (batch->endpoint->accepted > batch->refused_at)
	{
		settle_parked(branch, batch->endpoint);
		return;
	}
	foreach(lc, lane->queue)
		parked += ((SmBatch *) lfirst(lc))->parked ? 1 : 0;
	if (parked >= MAX_PARKED)
		fail_refused(lane, error);
}

/*
 * Single events of this lane wait for another to be accepted, and there is none
 * left to try: the batch fails as a whole.
 */
void
sm_answer_nothing_else(SmLane *lane)
{
	ListCell   *lc;

	foreach(lc, lane->queue)
	{
		SmBatch    *batch = lfirst(lc);

		if (batch->parked)
		{
			fail_refused(lane, pstrdup(batch->refusal));
			return;
		}
	}
}

static void
halve(SmBatch *batch, const char *error)
{
	SmBranch   *branch = batch->branch;
	SmReceipt	none = {0};

	if (batch->n > 1 && batch->lane != NULL)
	{
		branch->max_events = Max(1, batch->n / 2);
		branch->line = (SmLineRates) {.ceiling = branch->max_events};
		sm_batch_split(batch);
		return;
	}
	if (batch->lane == NULL)
	{
		halve_exceptions(batch, error);
		return;
	}
	sm_batch_settle_asides(batch);
	record_verdict(batch, 0, "rejected", error, NULL);
	write_ledger_row(batch, &none, 1 + list_length(batch->asides));
	sm_outbox_progress(branch->session, 0, 1);
	sm_batch_free(batch);
}

void
sm_answer_handle(SmBatch *batch, const SmHttpResult *result)
{
	SmBranch   *branch = batch->branch;
	Answer		answer = {0};

	if (branch->in_flight == batch)
		branch->in_flight = NULL;
	batch->attempt_count++;
	batch->last_attempt_at = GetCurrentTimestamp();
	if (batch->first_attempt_at == 0)
		batch->first_attempt_at = batch->last_attempt_at;

	decide(batch, result, &answer);
	if (answer.decision != DECIDE_OFFLINE && sm_endpoint_answered(batch->endpoint))
		sm_requeue_link_back(batch->endpoint);
	switch (answer.decision)
	{
		case DECIDE_SETTLE:
			settle(batch, result, &answer.receipt);
			break;
		case DECIDE_OFFLINE:
		case DECIDE_LATER:
		case DECIDE_HOLD:
			/* What the line can do is found out anew; a batch that is too large for it is built again, and split. */
			branch->line = (SmLineRates) {0};
			if (result->total_ms > SLOW_REQUEST_MS)
				carry_less(branch);
			fail_branch(batch, &answer);
			break;
		case DECIDE_HALVE:
			halve(batch, answer.error);
			break;
		case DECIDE_UNCOMPRESSED:
			batch->endpoint->plain = true;
			if (batch->lane)
				sm_batch_unbuild(batch);
			else
				sm_batch_free(batch);
			break;
		case DECIDE_BISECT:
			bisect(batch, answer.error);
			break;
	}
}

/* A batch that could not even be submitted (token file, URL). */
void
sm_answer_unsendable(SmBatch *batch, const char *error)
{
	Answer		answer = {.decision = DECIDE_HOLD, .error = pstrdup(error), .retry_after_ms = -1};

	batch->attempt_count++;
	batch->last_attempt_at = GetCurrentTimestamp();
	if (batch->first_attempt_at == 0)
		batch->first_attempt_at = batch->last_attempt_at;
	fail_branch(batch, &answer);
}
