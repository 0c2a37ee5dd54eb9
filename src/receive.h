/*
 * receive.h
 *		An event at headquarters: see receive.c and project.c.
 */
#ifndef SM_RECEIVE_H
#define SM_RECEIVE_H

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

#endif							/* SM_RECEIVE_H */
