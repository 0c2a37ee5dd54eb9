/*
 * keep.c
 *		Headquarters: a batch's events go into the inbox, and which numbers they have.
 *
 * Called by softmobile.central_receive(), in its transaction, with the branches of
 * the events locked.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "receive.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"
#include "writer.h"

PG_FUNCTION_INFO_V1(softmobile_central_write);
PG_FUNCTION_INFO_V1(softmobile_central_numbers);

/* Columns of softmobile.central_inbox. */
enum
{
	INBOX_BRANCH_ID, INBOX_ID, INBOX_EPOCH, INBOX_SEQ, INBOX_EVENT_TIME, INBOX_RECEIVED_AT, INBOX_EPOCH_NO, INBOX_LANE,
	INBOX_ENTITY_TYPE, INBOX_ENTITY_ID, INBOX_OP, INBOX_EFFECT, INBOX_ACTOR, INBOX_REASON, INBOX_DATA, INBOX_COLUMNS
};

/* Which of an event's columns it is; received_at and effect are none. */
static const int event_column[INBOX_COLUMNS] = {
	[INBOX_BRANCH_ID] = SM_EVENT_BRANCH_ID,
	[INBOX_ID] = SM_EVENT_ID,
	[INBOX_EPOCH] = SM_EVENT_EPOCH,
	[INBOX_SEQ] = SM_EVENT_SEQ,
	[INBOX_EVENT_TIME] = SM_EVENT_EVENT_TIME,
	[INBOX_RECEIVED_AT] = -1,
	[INBOX_EPOCH_NO] = SM_EVENT_EPOCH_NO,
	[INBOX_LANE] = SM_EVENT_LANE,
	[INBOX_ENTITY_TYPE] = SM_EVENT_ENTITY_TYPE,
	[INBOX_ENTITY_ID] = SM_EVENT_ENTITY_ID,
	[INBOX_OP] = SM_EVENT_OP,
	[INBOX_EFFECT] = -1,
	[INBOX_ACTOR] = SM_EVENT_ACTOR,
	[INBOX_REASON] = SM_EVENT_REASON,
	[INBOX_DATA] = SM_EVENT_DATA
};

static const Oid column_types[INBOX_COLUMNS] = {
	[INBOX_BRANCH_ID] = TEXTOID,
	[INBOX_ID] = UUIDOID,
	[INBOX_EPOCH] = UUIDOID,
	[INBOX_SEQ] = INT8OID,
	[INBOX_EVENT_TIME] = TIMESTAMPTZOID,
	[INBOX_RECEIVED_AT] = TIMESTAMPTZOID,
	[INBOX_EPOCH_NO] = INT4OID,
	[INBOX_LANE] = TEXTOID,
	[INBOX_ENTITY_TYPE] = TEXTOID,
	[INBOX_ENTITY_ID] = TEXTOID,
	[INBOX_OP] = TEXTOID,
	[INBOX_EFFECT] = TEXTOID,
	[INBOX_ACTOR] = TEXTOID,
	[INBOX_REASON] = TEXTOID,
	[INBOX_DATA] = JSONOID
};

/* softmobile.central_write(events softmobile.central_event[]) -> boolean; false: nothing is written, it takes a statement */
Datum
softmobile_central_write(PG_FUNCTION_ARGS)
{
	SmEventRows events;
	SmWriter	inbox;
	Datum		effect = PointerGetDatum(cstring_to_text("applied"));

	if (!sm_writer_open(&inbox, "central_inbox", column_types, INBOX_COLUMNS))
		PG_RETURN_BOOL(false);
	sm_event_rows_open(&events, PG_GETARG_ARRAYTYPE_P(0));
	for (int i = 0; i < events.n; i++)
	{
		Datum		values[SM_EVENT_COLUMNS];
		bool		nulls[SM_EVENT_COLUMNS];
		TupleTableSlot *slot = sm_writer_slot(&inbox);

		CHECK_FOR_INTERRUPTS();
		sm_event_rows_get(&events, i, values, nulls);
		for (int column = 0; column < INBOX_COLUMNS; column++)
			if (event_column[column] >= 0)
			{
				slot->tts_values[column] = values[event_column[column]];
				slot->tts_isnull[column] = nulls[event_column[column]];
			}
		slot->tts_values[INBOX_RECEIVED_AT] = TimestampTzGetDatum(GetCurrentTransactionStartTimestamp());
		slot->tts_values[INBOX_EFFECT] = effect;
		sm_writer_insert(&inbox);
	}
	sm_writer_close(&inbox);
	sm_event_rows_close(&events);
	CommandCounterIncrement();
	PG_RETURN_BOOL(true);
}

/* A lane of a batch. */
typedef struct Lane
{
	Datum		branch_id;		/* these three lie in the batch */
	Datum		epoch;
	Datum		lane;
	int			epoch_no;
	int64		lowest;
	int64		highest;
	int64		previous;
	int64		events;
	bool		ascending;		/* each number is higher than the one before */
} Lane;

static bool
texts_equal(Datum a, Datum b)
{
	text	   *x = DatumGetTextPP(a);
	text	   *y = DatumGetTextPP(b);

	return VARSIZE_ANY_EXHDR(x) == VARSIZE_ANY_EXHDR(y) && memcmp(VARDATA_ANY(x), VARDATA_ANY(y), VARSIZE_ANY_EXHDR(x)) == 0;
}

static bool
is_of_lane(const Lane *lane, const Datum *values)
{
	return memcmp(DatumGetUUIDP(lane->epoch), DatumGetUUIDP(values[SM_EVENT_EPOCH]), UUID_LEN) == 0 &&
		texts_equal(lane->lane, values[SM_EVENT_LANE]) && texts_equal(lane->branch_id, values[SM_EVENT_BRANCH_ID]);
}

/* The event's lane, among those of the events before it or new.  Runs of a lane are the usual case. */
static Lane *
find_lane(List **lanes, const Datum *values)
{
	Lane	   *lane;
	ListCell   *lc;

	if (*lanes != NIL && is_of_lane(llast(*lanes), values))
		return llast(*lanes);
	foreach(lc, *lanes)
		if (is_of_lane(lfirst(lc), values))
			return lfirst(lc);
	lane = palloc0(sizeof(Lane));
	lane->branch_id = values[SM_EVENT_BRANCH_ID];
	lane->epoch = values[SM_EVENT_EPOCH];
	lane->lane = values[SM_EVENT_LANE];
	lane->ascending = true;
	*lanes = lappend(*lanes, lane);
	return lane;
}

/*
 * softmobile.central_numbers(events softmobile.central_event[])
 * -> setof softmobile.central_batch_lane
 */
Datum
softmobile_central_numbers(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	SmEventRows events;
	List	   *lanes = NIL;
	ListCell   *lc;

	InitMaterializedSRF(fcinfo, 0);
	sm_event_rows_open(&events, PG_GETARG_ARRAYTYPE_P(0));
	for (int i = 0; i < events.n; i++)
	{
		Datum		values[SM_EVENT_COLUMNS];
		bool		nulls[SM_EVENT_COLUMNS];
		int64		seq;
		Lane	   *lane;

		sm_event_rows_get(&events, i, values, nulls);
		if (nulls[SM_EVENT_BRANCH_ID] || nulls[SM_EVENT_EPOCH] || nulls[SM_EVENT_LANE] || nulls[SM_EVENT_SEQ] || nulls[SM_EVENT_EPOCH_NO])
			elog(ERROR, "an event without a number");
		seq = DatumGetInt64(values[SM_EVENT_SEQ]);
		lane = find_lane(&lanes, values);
		lane->ascending = lane->ascending && seq > lane->previous;
		lane->previous = seq;
		lane->lowest = lane->events == 0 ? seq : Min(lane->lowest, seq);
		lane->highest = Max(lane->highest, seq);
		lane->epoch_no = Max(lane->epoch_no, DatumGetInt32(values[SM_EVENT_EPOCH_NO]));
		lane->events++;
	}
	foreach(lc, lanes)
	{
		const Lane *lane = lfirst(lc);
		Datum		values[] = {
			lane->branch_id, lane->epoch, lane->lane, Int32GetDatum(lane->epoch_no),
			Int64GetDatum(lane->lowest), Int64GetDatum(lane->highest), Int64GetDatum(lane->events), BoolGetDatum(lane->ascending)
		};
		bool		nulls[lengthof(values)] = {false};

		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	sm_event_rows_close(&events);
	return (Datum) 0;
}
