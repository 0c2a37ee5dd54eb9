/*
 * writer.h
 *		A table of headquarters, written as logical replication's apply worker
 *		writes: see writer.c.
 */
#ifndef SM_WRITER_H
#define SM_WRITER_H

#include "executor/executor.h"

/* Rows that are written together; also a bound on what is held in memory. */
#define SM_WRITER_ROWS	100

typedef struct SmWriter
{
	Relation	relation;
	EState	   *estate;
	ResultRelInfo *target;
	EPQState	epq;
	bool		together;		/* no trigger wants to see a row before the next one is written */
	TupleTableSlot *slots[SM_WRITER_ROWS];	/* created when first needed */
	int			n;				/* filled, not written yet */
} SmWriter;

/*
 * types: of the columns that the caller knows of.  false: nothing is open; the table
 * is, or has, something that only a statement heeds, and the caller has to use one.
 */
extern bool sm_writer_open(SmWriter *writer, const char *table, const Oid *types, int columns);

/* An empty slot with no column NULL; to be filled and then inserted, or given up. */
extern TupleTableSlot *sm_writer_slot(SmWriter *writer);

/* Inserts the slot's row, at the latest when the table is closed. */
extern void sm_writer_insert(SmWriter *writer);

/* Puts the slot's row in the place of one that was read. */
extern void sm_writer_update(SmWriter *writer, TupleTableSlot *old);

/* Writes what has not been written, fires what fires at a statement's end. */
extern void sm_writer_close(SmWriter *writer);

#endif							/* SM_WRITER_H */
