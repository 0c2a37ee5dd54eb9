/*
 * logindex.h
 *		New rows of the log in its segment's indexes: see logindex.c.
 */
#ifndef SM_LOGINDEX_H
#define SM_LOGINDEX_H

#include "executor/tuptable.h"
#include "nodes/execnodes.h"
#include "utils/rel.h"

/* Column id of softmobile.outbox_event. */
#define SM_EVENT_ID		3

typedef struct SmLogIndex
{
	Relation	rel;
	IndexInfo  *info;			/* NULL: not needed yet */
	bool		summarizes_ids;	/* lowest and highest id of many pages, and nothing else */
} SmLogIndex;

typedef struct SmLogIndexes
{
	Relation	segment;
	int			n;
	SmLogIndex *index;
} SmLogIndexes;

extern void sm_logindex_init(void);

/* The segment is open, and locked to the end of the transaction. */
extern void sm_logindex_open(SmLogIndexes *indexes, Relation segment);
extern void sm_logindex_close(SmLogIndexes *indexes);

/* Rows that have just been put into the heap, in the order of their places there. */
extern void sm_logindex_insert(SmLogIndexes *indexes, TupleTableSlot **slots, int n);

#endif							/* SM_LOGINDEX_H */
