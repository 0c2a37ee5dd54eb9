/*
 * gaps.h
 *		Numbers that are missing below visible ones: see gaps.c.
 */
#ifndef SM_GAPS_H
#define SM_GAPS_H

#include "nodes/pg_list.h"
#include "ranges.h"

/* Open gaps of a lane beyond which no further number is read. */
#define SM_GAPS_MAX		200000

/* Transactions, by virtual transaction id in 64 bits, sorted. */
typedef struct SmHolders
{
	uint64	   *vxid;
	int			n;
	bool		complete;		/* none was caught between two states */
} SmHolders;

/* Gaps that the same transactions may still fill. */
typedef struct SmGapGroup
{
	SmRanges	gaps;
	SmHolders	holders;
	bool		look;			/* must be looked at under the next snapshot */
	bool		over;			/* all holders had ended before that snapshot */
} SmGapGroup;

typedef struct SmGaps
{
	List	   *groups;			/* of SmGapGroup */
	MemoryContext cxt;
} SmGaps;

/* Forgets the locks seen so far; to be called when a new snapshot is taken. */
extern void sm_gaps_new_snapshot(void);

/* The transactions that hold a lane's sequence; result in CurrentMemoryContext. */
extern SmHolders sm_gaps_holders(Oid seqrelid);

/* Strikes off the holders that are no longer there; true when there were any. */
extern bool sm_gaps_strike_off(SmHolders *was, const SmHolders *now);

extern int	sm_gaps_count(const SmGaps *gaps);

/* True when a gap must be looked at again without waiting for anybody. */
extern bool sm_gaps_pressing(const SmGaps *gaps);

/* Notes gaps found under the snapshot in use; holders must be complete. */
extern void sm_gaps_note(SmGaps *gaps, const SmRanges *found, const SmHolders *holders);

/*
 * Looks at the gaps whose holders have changed: fill() adds to its set which
 * numbers of the given gaps are visible by now.  Those are added to *filled, and
 * those that nobody can fill any more to *voids.
 */
typedef void (*SmGapsFill) (const SmRanges *gaps, SmRanges *visible, void *arg);
extern void sm_gaps_look(SmGaps *gaps, const SmHolders *holders, SmGapsFill fill, void *arg,
						 SmRanges *filled, SmRanges *voids);

#endif							/* SM_GAPS_H */
