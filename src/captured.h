/*
 * captured.h
 *		What the capture trigger knows of a table: see captured.c.
 */
#ifndef SM_CAPTURED_H
#define SM_CAPTURED_H

#include "access/attnum.h"
#include "encode.h"
#include "lanes.h"
#include "utils/relcache.h"

typedef struct SmCaptured
{
	bool		attached;		/* itself or an ancestor; else nothing below is set */
	int			entity_no;
	SmPriority	priority;
	const bool *enabled;		/* the setting that switches this entity type */
	bool		require_reason;
	int			nkeys;
	AttrNumber *keys;
	int			nbranches;
	AttrNumber *branches;
	AttrNumber	reason;			/* 0: none, as for the two below */
	AttrNumber	folio;
	AttrNumber	amount;
	bool		amount_is_numeric;
	SmEncoder  *encoder;
} SmCaptured;

extern void sm_captured_init(void);

/* Good for the trigger call, whatever changes meanwhile. */
extern SmCaptured *sm_captured_find(Relation table);

#endif							/* SM_CAPTURED_H */
