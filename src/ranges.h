/*
 * ranges.h
 *		Sets of lane numbers as sorted ranges, in the worker's memory.
 */
#ifndef SM_RANGES_H
#define SM_RANGES_H

typedef struct SmRange
{
	int64		lo;				/* first member */
	int64		hi;				/* one past the last */
} SmRange;

/*
 * Sorted, disjoint, not adjacent.  All zero is the empty set.  The array lies in
 * the context that was current when the first range was added.
 */
typedef struct SmRanges
{
	SmRange    *range;
	int			n;
	int			size;			/* allocated */
} SmRanges;

/* Adds [lo, hi), which must begin at or after the end of the last range. */
extern void sm_ranges_append(SmRanges *set, int64 lo, int64 hi);

/* Adds [lo, hi) anywhere. */
extern void sm_ranges_add(SmRanges *set, int64 lo, int64 hi);

extern bool sm_ranges_contain(const SmRanges *set, int64 seq);

/* The first range that ends after seq, or NULL. */
extern const SmRange *sm_ranges_after(const SmRanges *set, int64 seq);

extern SmRanges sm_ranges_minus(const SmRanges *set, const SmRanges *less);

extern void sm_ranges_clear(SmRanges *set);

/* Number of members. */
extern int64 sm_ranges_count(const SmRanges *set);

/* The set as the text of an int8multirange. */
extern char *sm_ranges_text(const SmRanges *set);

#endif							/* SM_RANGES_H */
