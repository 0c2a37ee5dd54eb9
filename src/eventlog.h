/*
 * eventlog.h
 *		Appends events to the outbox: see eventlog.c.
 */
#ifndef SM_EVENTLOG_H
#define SM_EVENTLOG_H

#include "lanes.h"
#include "lib/stringinfo.h"

typedef struct SmNewEvent
{
	SmPriority	priority;
	int			entity_no;
	char		op;				/* i, u, d, s */
	const char *branch;
	const char *entity_id;
	const char *actor;
	const char *reason;			/* NULL: none */
	const char *folio;			/* NULL: none */
	Datum		amount;			/* numeric */
	bool		has_amount;
	StringInfo	payload;		/* JSON, in the server's encoding, behind VARHDRSZ bytes of room */
} SmNewEvent;

extern void sm_eventlog_init(void);

/* Appends an event, to be written before the commit at the latest. */
extern void sm_eventlog_append(const SmNewEvent *event);

/* Writes what has been appended, as far as this level of subtransaction goes. */
extern void sm_eventlog_flush(void);

/* True when this transaction has appended an event (not told apart by savepoint). */
extern bool sm_eventlog_in_transaction(void);

/* Poke the worker of this database when this transaction commits. */
extern void sm_eventlog_poke_at_commit(void);

#endif							/* SM_EVENTLOG_H */
