/*
 * batch.c
 *		Putting batches together: which events, in which order, and their body.
 *
 * Called by delivery.c between sm_outbox_begin() and its commit; everything that
 * one pass reads, it reads under one snapshot.  See gaps.c for why that keeps the
 * order of an entity's events although they commit out of order.
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "delivery.h"
#include "guc.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

static const char *const lane_words[SM_PRIORITIES] = {"high", "normal", "low"};

/* Bytes that bodies occupy now, in all batches. */
static int64 body_memory = 0;

int64
sm_batch_memory(void)
{
	return body_memory;
}

SmBatch *
sm_batch_create(SmLane *lane, SmBranch *branch)
{
	MemoryContext cxt = AllocSetContextCreate(sm_delivery_cxt, "softmobile batch", ALLOCSET_SMALL_SIZES);
	SmBatch    *batch = MemoryContextAllocZero(cxt, sizeof(SmBatch));

	batch->cxt = cxt;
	batch->lane = lane;
	batch->branch = branch;
	batch->refused_at = -1;
	if (!pg_strong_random(batch->trace_id, sizeof(batch->trace_id)))
		elog(ERROR, "could not generate random values");
	return batch;
}

void
sm_batch_enqueue(SmLane *lane, SmBatch *batch)
{
	MemoryContext caller = MemoryContextSwitchTo(sm_delivery_cxt);

	lane->queue = lappend(lane->queue, batch);
	MemoryContextSwitchTo(caller);
}

void
sm_batch_free(SmBatch *batch)
{
	sm_batch_unbuild(batch);
	if (batch->lane)
		batch->lane->queue = list_delete_ptr(batch->lane->queue, batch);
	MemoryContextDelete(batch->cxt);
}

/* A batch that an earlier worker left failed or requeued. */
SmBatch *
sm_batch_restore(SmLane *lane, const SmRanges *members)
{
	SmBatch    *batch = sm_batch_create(lane, lane->branch);
	MemoryContext caller = MemoryContextSwitchTo(batch->cxt);

	for (int i = 0; i < members->n; i++)
		sm_ranges_append(&batch->members, members->range[i].lo, members->range[i].hi);
	MemoryContextSwitchTo(caller);
	sm_batch_enqueue(lane, batch);
	return batch;
}

/* Blocked entities whose type and id have the same hash. */
typedef struct BlockedEntry
{
	uint64		hash;
	List	   *entities;		/* of SmBlockedEntity */
} BlockedEntry;

static uint64
hash_entity(int entity_no, const char *entity_id)
{
	return hash_bytes_extended((const unsigned char *) entity_id, strlen(entity_id), entity_no);
}

/* Makes a queued batch the next of its lane. */
void
sm_batch_to_front(SmBatch *batch)
{
	SmLane	   *lane = batch->lane;
	MemoryContext caller = MemoryContextSwitchTo(sm_delivery_cxt);

	lane->queue = lcons(batch, list_delete_ptr(lane->queue, batch));
	MemoryContextSwitchTo(caller);
}

/* Notes that an entity's later events have to wait behind an exception. */
void
sm_batch_block(SmBranch *branch, int entity_no, const char *entity_id, const pg_uuid_t *id)
{
	MemoryContext caller = MemoryContextSwitchTo(sm_delivery_cxt);
	uint64		hash = hash_entity(entity_no, entity_id);
	SmBlockedEntity *blocked;
	BlockedEntry *entry;
	bool		found;

	if (branch->blocked == NULL)
	{
		HASHCTL		ctl = {.keysize = sizeof(uint64), .entrysize = sizeof(BlockedEntry), .hcxt = sm_delivery_cxt};

		branch->blocked = hash_create("softmobile blocked entities", 64, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}
	entry = hash_search(branch->blocked, &hash, HASH_ENTER, &found);
	if (!found)
		entry->entities = NIL;
	blocked = palloc0(sizeof(SmBlockedEntity));
	blocked->entity_no = entity_no;
	blocked->entity_id = pstrdup(entity_id);
	blocked->exception = *id;
	entry->entities = lappend(entry->entities, blocked);
	MemoryContextSwitchTo(caller);
}

/* What is blocked is read anew when the next event asks. */
void
sm_batch_forget_blocked(SmBranch *branch)
{
	HASH_SEQ_STATUS status;
	BlockedEntry *entry;

	branch->blocked_known = false;
	if (branch->blocked == NULL)
		return;
	hash_seq_init(&status, branch->blocked);
	while ((entry = hash_seq_search(&status)) != NULL)
	{
		ListCell   *lc;

		foreach(lc, entry->entities)
			pfree(((SmBlockedEntity *) lfirst(lc))->entity_id);
		list_free_deep(entry->entities);
	}
	hash_destroy(branch->blocked);
	branch->blocked = NULL;
}

/* The first open exception of an entity, or NULL. */
const SmBlockedEntity *
sm_batch_blocked(SmBranch *branch, int entity_no, const char *entity_id)
{
	ListCell   *lc;
	BlockedEntry *entry;
	uint64		hash;

	if (!branch->blocked_known)
	{
		List	   *rows = sm_outbox_blocked(branch->id);

		foreach(lc, rows)
		{
			SmBlockedEntity *row = lfirst(lc);

			sm_batch_block(branch, row->entity_no, row->entity_id, &row->exception);
		}
		branch->blocked_known = true;
	}
	if (branch->blocked == NULL)
		return NULL;
	hash = hash_entity(entity_no, entity_id);
	entry = hash_search(branch->blocked, &hash, HASH_FIND, NULL);
	if (entry == NULL)
		return NULL;
	foreach(lc, entry->entities)
	{
		SmBlockedEntity *blocked = lfirst(lc);

		if (blocked->entity_no == entity_no && strcmp(blocked->entity_id, entity_id) == 0)
			return blocked;
	}
	return NULL;
}

/* The entity's event that was refused alone and is parked, before this batch in the queue. */
static SmBatch *
find_parked(SmBatch *batch, int entity_no, const char *entity_id)
{
	ListCell   *lc;

	foreach(lc, batch->lane->queue)
	{
		SmBatch    *other = lfirst(lc);

		if (other == batch)
			break;
		if (other->parked && other->n == 1 && other->entity_nos[0] == entity_no &&
			strcmp(other->events[0].entity_id, entity_id) == 0)
			return other;
	}
	return NULL;
}

void
sm_batch_begin(SmBatch *batch)
{
	MemoryContext caller;
	bool		plain;

	batch->endpoint = batch->branch->endpoint;
	plain = batch->endpoint->plain || sm_compression == SM_COMPRESSION_NONE;
	batch->body_cxt = AllocSetContextCreate(batch->cxt, "softmobile body", ALLOCSET_DEFAULT_SIZES);
	caller = MemoryContextSwitchTo(batch->body_cxt);
	sm_wire_begin(&batch->body, plain ? SM_WIRE_PLAIN : SM_WIRE_GZIP);
	MemoryContextSwitchTo(caller);
	batch->needs_flush = false;
	batch->ready_at = 0;
	batch->n = 0;
	batch->size = 0;
	batch->events = NULL;
	batch->entity_nos = NULL;
	batch->attempts = NULL;
	batch->asides = NIL;
	batch->built = true;
}

void
sm_batch_end(SmBatch *batch)
{
	SmLane	   *lane = batch->lane;

	sm_wire_end(&batch->body);
	body_memory += batch->body.out.len;
	if (batch->n > 0)
		sm_wire_idempotency_key(batch->key, lane ? lane->epoch : "exceptions",
								lane ? lane_words[lane->priority] : "", batch->events, batch->n);
}

/* Gives the body's memory back; the batch stays what it is. */
void
sm_batch_unbuild(SmBatch *batch)
{
	if (!batch->built)
		return;
	body_memory -= batch->body.out.len;
	sm_wire_free(&batch->body);
	MemoryContextDelete(batch->body_cxt);
	batch->body_cxt = NULL;
	batch->built = false;
	batch->events = NULL;
	batch->entity_nos = NULL;
	batch->asides = NIL;
	batch->n = 0;
}

/*
 * An entity of the branch has to wait from now on: bodies that were built before
 * may hold its later events.
 */
void
sm_batch_unbuild_others(SmBranch *branch, SmBatch *batch)
{
	ListCell   *lc;

	foreach(lc, branch->lanes)
	{
		ListCell   *cell;

		foreach(cell, ((SmLane *) lfirst(lc))->queue)
		{
			SmBatch    *other = lfirst(cell);

			if (other != batch && !other->parked && other != branch->in_flight)
				sm_batch_unbuild(other);
		}
	}
}

static void
put_aside(SmBatch *batch, const SmEvent *event, const char *kind, const char *error)
{
	MemoryContext caller = MemoryContextSwitchTo(batch->body_cxt);
	SmAside    *aside = palloc0(sizeof(SmAside));

	aside->seq = event->seq;
	aside->kind = kind;
	aside->error = pstrdup(error);
	batch->asides = lappend(batch->asides, aside);
	MemoryContextSwitchTo(caller);
}

/* The event is of an entity whose earlier event is, or may become, an exception. */
static void
put_behind(SmBatch *batch, const SmEvent *event, const pg_uuid_t *exception)
{
	char	   *text = DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(exception)));

	put_aside(batch, event, "waiting", psprintf("waits for %s", text));
	((SmAside *) llast(batch->asides))->waits_for = *exception;
}

static void
remember_event(SmBatch *batch, const SmEvent *event, int entity_no)
{
	MemoryContext caller = MemoryContextSwitchTo(batch->body_cxt);

	if (batch->n == batch->size)
	{
		batch->size = Max(64, batch->size * 2);
		if (batch->events == NULL)
		{
			batch->events = palloc(batch->size * sizeof(SmEvent));
			batch->entity_nos = palloc(batch->size * sizeof(int));
		}
		else
		{
			batch->events = repalloc(batch->events, batch->size * sizeof(SmEvent));
			batch->entity_nos = repalloc(batch->entity_nos, batch->size * sizeof(int));
		}
	}
	batch->events[batch->n] = *event;
	batch->events[batch->n].entity_id = pstrdup(event->entity_id);
	/* the rest is in the body already */
	batch->events[batch->n].entity_type = NULL;
	batch->events[batch->n].branch_id = NULL;
	batch->events[batch->n].reason = NULL;
	batch->events[batch->n].actor = NULL;
	batch->events[batch->n].payload = NULL;
	if (event->resolution)
		batch->events[batch->n].resolution = pstrdup(event->resolution);
	batch->entity_nos[batch->n] = entity_no;
	batch->needs_flush |= !sm_delivery_on_disk(event->xid);
	batch->n++;
	MemoryContextSwitchTo(caller);
}

static bool
is_full(const SmBatch *batch, const SmEvent *event)
{
	if (list_length(batch->asides) >= sm_batch_max_events)
		return true;
	return batch->n > 0 &&
		(batch->n >= batch->branch->max_events ||
		 batch->body.raw_len + event->payload_len > (int64) sm_batch_max_bytes * 1024);
}

/* Adds an event to the body, or puts it aside. */
SmBatchAdded
sm_batch_add(SmBatch *batch, const SmEvent *event, int entity_no)
{
	SmBranch   *branch = batch->branch;
	SmLane	   *lane = batch->lane;
	SmEvent		sent = *event;
	const SmBlockedEntity *blocked;
	SmBatch    *parked;

	if (is_full(batch, event))
		return SM_BATCH_FULL;
	blocked = sm_batch_blocked(branch, entity_no, event->entity_id);
	if (blocked != NULL)
	{
		put_behind(batch, event, &blocked->exception);
		return SM_BATCH_ADDED;
	}

	/* Whatever becomes of the parked one, this one shares its fate. */
	parked = find_parked(batch, entity_no, event->entity_id);
	if (parked != NULL)
	{
		MemoryContext caller;

		put_behind(parked, event, &parked->events[0].id);
		caller = MemoryContextSwitchTo(parked->cxt);
		sm_ranges_add(&parked->members, event->seq, event->seq + 1);
		MemoryContextSwitchTo(caller);
		return SM_BATCH_ELSEWHERE;
	}

	sent.branch_id = branch->id;
	if (sent.entity_type == NULL)
		sent.entity_type = "unknown";
	if (!sm_wire_add(&batch->body, &sent, lane_words[lane->priority], lane->epoch, lane->epoch_no))
	{
		put_aside(batch, event, "rejected", batch->body.error);
		sm_batch_block(branch, entity_no, event->entity_id, &event->id);
		return SM_BATCH_ADDED;
	}
	remember_event(batch, event, entity_no);
	return SM_BATCH_ADDED;
}

/* Queues a batch right behind another one of its lane. */
static void
insert_behind(SmBatch *batch, SmBatch *next)
{
	SmLane	   *lane = batch->lane;
	MemoryContext caller = MemoryContextSwitchTo(sm_delivery_cxt);

	for (int i = 0; i < list_length(lane->queue); i++)
		if (list_nth(lane->queue, i) == batch)
		{
			lane->queue = list_insert_nth(lane->queue, i + 1, next);
			break;
		}
	MemoryContextSwitchTo(caller);
}

/* State of building a queued batch again. */
typedef struct Rebuilding
{
	SmBatch    *batch;
	SmRanges	elsewhere;		/* members that another batch settles now */
	int64		full_at;		/* first member that did not fit */
} Rebuilding;

static bool
rebuild_event(const SmEvent *event, int entity_no, void *arg)
{
	Rebuilding *r = arg;
	MemoryContext caller;

	switch (sm_batch_add(r->batch, event, entity_no))
	{
		case SM_BATCH_ADDED:
			break;
		case SM_BATCH_ELSEWHERE:
			caller = MemoryContextSwitchTo(r->batch->body_cxt);
			sm_ranges_append(&r->elsewhere, event->seq, event->seq + 1);
			MemoryContextSwitchTo(caller);
			break;
		case SM_BATCH_FULL:
			r->full_at = event->seq;
			return false;
	}
	return true;
}

/* The members from a number on, in a batch of their own behind this one. */
static SmBatch *
split_off(SmBatch *batch, int64 from)
{
	SmBatch    *behind = sm_batch_create(batch->lane, batch->branch);
	SmRanges	kept = {0};
	MemoryContext caller = CurrentMemoryContext;

	for (int i = 0; i < batch->members.n; i++)
	{
		SmRange		range = batch->members.range[i];

		if (range.lo < from)
		{
			MemoryContextSwitchTo(batch->cxt);
			sm_ranges_append(&kept, range.lo, Min(range.hi, from));
		}
		if (range.hi > from)
		{
			MemoryContextSwitchTo(behind->cxt);
			sm_ranges_append(&behind->members, Max(range.lo, from), range.hi);
		}
	}
	MemoryContextSwitchTo(caller);
	sm_ranges_clear(&batch->members);
	batch->members = kept;
	behind->refused_at = batch->refused_at;
	insert_behind(batch, behind);
	return behind;
}

/*
 * Builds the body of a queued batch again.  Members that no longer fit are split
 * off into a batch of their own behind this one.  False when nothing is left to
 * send; its asides then still have to be settled.
 */
bool
sm_batch_build(SmBatch *batch)
{
	Rebuilding	r = {.batch = batch, .full_at = PG_INT64_MAX};

	if (batch->built)
		return batch->n > 0;
	sm_batch_begin(batch);
	sm_outbox_read_members(batch->lane->log_id, &batch->members, rebuild_event, &r);
	sm_batch_end(batch);

	if (r.full_at != PG_INT64_MAX)
		(void) split_off(batch, r.full_at);
	if (r.elsewhere.n > 0)
	{
		MemoryContext caller = MemoryContextSwitchTo(batch->cxt);
		SmRanges	rest = sm_ranges_minus(&batch->members, &r.elsewhere);

		sm_ranges_clear(&batch->members);
		batch->members = rest;
		MemoryContextSwitchTo(caller);
	}
	return batch->n > 0;
}

/*
 * Halves a batch of several events that was refused: this one keeps the first
 * half, the second follows it in the queue.
 */
void
sm_batch_split(SmBatch *batch)
{
	(void) split_off(batch, batch->events[batch->n / 2].seq);
	sm_batch_unbuild(batch);
}

/* The queued exceptions of a branch that can go now, or NULL. */
SmBatch *
sm_batch_exceptions(SmBranch *branch)
{
	SmExceptionEvent *rows;
	int			limit = branch->max_exceptions > 0 ? branch->max_exceptions : branch->max_events;
	uint64		n = sm_outbox_queued_exceptions(branch->id, limit, &rows);
	SmBatch    *batch;

	if (n == 0)
		return NULL;
	batch = sm_batch_create(NULL, branch);
	sm_batch_begin(batch);
	batch->attempts = MemoryContextAllocZero(batch->body_cxt, sizeof(int) * n);
	for (uint64 i = 0; i < n; i++)
	{
		SmLane	   *lane = NULL;
		ListCell   *lc;

		if (batch->n > 0 && batch->body.raw_len + rows[i].event.payload_len > (int64) sm_batch_max_bytes * 1024)
			break;
		foreach(lc, branch->lanes)
			if (((SmLane *) lfirst(lc))->lane_id == rows[i].lane_id)
				lane = lfirst(lc);
		if (lane == NULL)
			continue;
		if (!sm_wire_add(&batch->body, &rows[i].event, lane_words[lane->priority], lane->epoch, lane->epoch_no))
		{
			SmExceptionRow row = {.kind = "rejected", .attempt_count = sm_max_attempts,
			.last_attempt_at = GetCurrentTimestamp(), .error_message = batch->body.error};

			sm_outbox_exception_failed(&rows[i].event.id, &row);
			continue;
		}
		batch->attempts[batch->n] = rows[i].attempt_count;
		remember_event(batch, &rows[i].event, rows[i].entity_no);
	}
	sm_batch_end(batch);
	if (batch->n == 0)
	{
		sm_batch_free(batch);
		return NULL;
	}
	return batch;
}

/* Records what a batch puts aside; without anything sent, its ledger row too. */
void
sm_batch_settle_asides(SmBatch *batch)
{
	SmLane	   *lane = batch->lane;
	ListCell   *lc;

	foreach(lc, batch->asides)
	{
		SmAside    *aside = lfirst(lc);
		SmExceptionRow row = {.kind = aside->kind, .error_message = aside->error};

		if (strcmp(aside->kind, "waiting") == 0)
		{
			row.waits_for = &aside->waits_for;
			batch->branch->exceptions_idle = false; /* it may be what a resolved conflict waits for */
		}
		else
			row.attempt_count = sm_max_attempts;	/* sending it again helps nobody */
		sm_outbox_add_exception(lane->lane_id, lane->log_id, &row, aside->seq, batch->branch->id);
	}
	if (batch->n == 0 && batch->asides != NIL)
	{
		SmSettlement settlement = {.lane_id = lane->lane_id, .members = &batch->members,
		.exceptions = list_length(batch->asides), .fold = true};

		sm_outbox_settle(&settlement);
		lane->folded = true;
	}
}
