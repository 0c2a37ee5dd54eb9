/*
 * receive.h
 *		An event at headquarters: see receive.c, keep.c and project.c.
 */
#ifndef SM_RECEIVE_H
#define SM_RECEIVE_H

#include "access/tupdesc.h"
#include "utils/array.h"

/* Columns of softmobile.central_event. */
enum
{
	SM_EVENT_N,
	SM_EVENT_BRANCH_ID,
	SM_EVENT_ID,
	SM_EVENT_EPOCH,
	SM_EVENT_EPOCH_NO,
	SM_EVENT_LANE,
	SM_EVENT_SEQ,
	SM_EVENT_ORDER_EPOCH,
	SM_EVENT_ENTITY_TYPE,
	SM_EVENT_ENTITY_ID,
	SM_EVENT_OP,
	SM_EVENT_EVENT_TIME,
	SM_EVENT_ACTOR,
	SM_EVENT_REASON,
	SM_EVENT_RESOLUTION,
	SM_EVENT_DATA,
	SM_EVENT_NEW,
	SM_EVENT_OLD,
	SM_EVENT_COLUMNS
};

/* The events of a softmobile.central_event[]. */
typedef struct SmEventRows
{
	TupleDesc	desc;
	Datum	   *rows;
	int			n;
} SmEventRows;

extern void sm_event_rows_open(SmEventRows *events, ArrayType *array);
extern void sm_event_rows_get(const SmEventRows *events, int i, Datum *values, bool *nulls);
extern void sm_event_rows_close(SmEventRows *events);

#endif							/* SM_RECEIVE_H */
