/*
 * eventlog.c
 *		Appends events to the outbox, in the transaction whose change they tell.
 *
 * Called by capture for every row, so it goes past SPI and the executor: the
 * row is formed here and put into heap and indexes with the functions that the
 * system's own catalogs use.  The application's role needs no rights on the
 * outbox.  The only locks are RowExclusiveLock on the current segment and on the
 * lane's sequence; neither makes one sale wait for another.
 *
 * Order matters: the transaction id first, then the number, then the row.  The
 * worker relies on it (gaps.c).
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/indexing.h"
#include "eventlog.h"
#include "guc.h"
#include "miscadmin.h"
#include "seqno.h"
#include "shmem.h"
#include "utils/builtins.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"
#include "uuid7.h"

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

static bool appended = false;	/* in this transaction */
static bool poke_wanted = false;	/* at its commit */

static void
at_transaction_end(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_ABORT:
		case XACT_EVENT_PREPARE:
			poke_wanted = false;
			/* FALLTHROUGH */
		case XACT_EVENT_COMMIT:
			appended = false;
			break;
		default:
			break;
	}
}

/*
 * Wakes the worker when it can see all of a commit: its invalidation messages
 * (branches and lanes), and that it holds the sequence no more.
 */
static void
at_release(ResourceReleasePhase phase, bool is_commit, bool is_top_level, void *arg)
{
	if (!poke_wanted || phase != RESOURCE_RELEASE_AFTER_LOCKS || !is_commit || !is_top_level)
		return;
	poke_wanted = false;
	sm_shmem_poke(MyDatabaseId);
}

void
sm_eventlog_init(void)
{
	RegisterXactCallback(at_transaction_end, NULL);
	RegisterResourceReleaseCallback(at_release, NULL);
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

static void
put_text(Datum *values, bool *nulls, int col, const char *text)
{
	nulls[col] = text == NULL;
	if (text != NULL)
		values[col] = CStringGetTextDatum(text);
}

void
sm_eventlog_append(const SmNewEvent *event)
{
	Datum		values[EVENT_COLUMNS] = {0};
	bool		nulls[EVENT_COLUMNS] = {0};
	Relation	segment;
	CatalogIndexState indexes;
	HeapTuple	tuple;
	SmLaneRef	lane;
	bool		registered;
	TimestampTz now = GetCurrentTimestamp();
	pg_uuid_t	id;

	lane = sm_lanes_find(event->branch, event->priority, &registered);
	segment = sm_lanes_open_segment();

	(void) GetCurrentTransactionId();
	sm_uuid7_generate(now, &id);
	values[COL_SEQ] = Int64GetDatum(sm_seqno_next(lane.seqrelid));
	values[COL_CREATED_AT] = TimestampTzGetDatum(now);
	values[COL_ID] = UUIDPGetDatum(&id);
	values[COL_LANE_ID] = Int32GetDatum(lane.lane_id);
	values[COL_ENTITY_NO] = Int32GetDatum(event->entity_no);
	values[COL_OP] = CharGetDatum(event->op);
	put_text(values, nulls, COL_BRANCH_ID, registered ? NULL : event->branch);
	put_text(values, nulls, COL_ENTITY_ID, event->entity_id);
	put_text(values, nulls, COL_ACTOR, event->actor);
	put_text(values, nulls, COL_REASON, event->reason);
	put_text(values, nulls, COL_FOLIO, event->folio);
	values[COL_AMOUNT] = event->amount;
	nulls[COL_AMOUNT] = !event->has_amount;
	values[COL_PAYLOAD] = PointerGetDatum(cstring_to_text_with_len(event->payload, event->payload_len));

	tuple = heap_form_tuple(RelationGetDescr(segment), values, nulls);
	indexes = CatalogOpenIndexes(segment);
	CatalogTupleInsertWithInfo(segment, tuple, indexes);
	CatalogCloseIndexes(indexes);
	table_close(segment, NoLock);

	appended = true;
	poke_wanted = true;
}
