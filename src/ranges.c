/*
 * ranges.c
 *		Sets of lane numbers as sorted ranges, in the worker's memory.
 *
 * In tables these sets are int8multiranges; this is the form in which the
 * worker builds them number by number.
 */
#include "postgres.h"

#include "lib/stringinfo.h"
#include "ranges.h"

/* Makes room for one more range. */
static void
reserve_range(SmRanges *set)
{
	if (set->n < set->size)
		return;
	if (set->range == NULL)
	{
		set->size = 4;
		set->range = palloc(set->size * sizeof(SmRange));
		return;
	}
	set->size *= 2;
	set->range = repalloc_huge(set->range, set->size * sizeof(SmRange));
}

void
sm_ranges_append(SmRanges *set, int64 lo, int64 hi)
{
	Assert(lo < hi);
	if (set->n > 0)
	{
		SmRange    *last = &set->range[set->n - 1];

		Assert(lo >= last->hi);
		if (lo == last->hi)
		{
			last->hi = hi;
			return;
		}
	}
	reserve_range(set);
	set->range[set->n++] = (SmRange) {lo, hi};
}

/* Index of the first range that ends after seq; n when there is none. */
static int
search_after(const SmRanges *set, int64 seq)
{
	int			low = 0;
	int			high = set->n;

	while (low < high)
	{
		int			mid = low + (high - low) / 2;

		if (set->range[mid].hi > seq)
			high = mid;
		else
			low = mid + 1;
	}
	return low;
}

void
sm_ranges_add(SmRanges *set, int64 lo, int64 hi)
{
	int			first = search_after(set, lo - 1);	/* touches or follows */
	int			last = first;

	Assert(lo < hi);
	while (last < set->n && set->range[last].lo <= hi)
	{
		lo = Min(lo, set->range[last].lo);
		hi = Max(hi, set->range[last].hi);
		last++;
	}
	if (first == last)
		reserve_range(set);
	memmove(&set->range[first + 1], &set->range[last], (set->n - last) * sizeof(SmRange));
	set->n += 1 - (last - first);
	set->range[first] = (SmRange) {lo, hi};
}

bool
sm_ranges_contain(const SmRanges *set, int64 seq)
{
	const SmRange *range = sm_ranges_after(set, seq);

	return range != NULL && range->lo <= seq;
}

const SmRange *
sm_ranges_after(const SmRanges *set, int64 seq)
{
	int			i = search_after(set, seq);

	return i < set->n ? &set->range[i] : NULL;
}

void
sm_ranges_clear(SmRanges *set)
{
	if (set->range != NULL)
		pfree(set->range);
	memset(set, 0, sizeof(*set));
}

int64
sm_ranges_count(const SmRanges *set)
{
	int64		count = 0;

	for (int i = 0; i < set->n; i++)
		count += set->range[i].hi - set->range[i].lo;
	return count;
}

char *
sm_ranges_text(const SmRanges *set)
{
	StringInfoData text;

	initStringInfo(&text);
	appendStringInfoChar(&text, '{');
	for (int i = 0; i < set->n; i++)
		appendStringInfo(&text, "%s[" INT64_FORMAT "," INT64_FORMAT ")", i == 0 ? "" : ",",
						 set->range[i].lo, set->range[i].hi);
	appendStringInfoChar(&text, '}');
	return text.data;
}

/* The members of set that are not in less, as a new set. */
SmRanges
sm_ranges_minus(const SmRanges *set, const SmRanges *less)
{
	SmRanges	rest = {0};
	const SmRange *end = less->range + less->n;

	for (int i = 0; i < set->n; i++)
	{
		int64		lo = set->range[i].lo;
		int64		hi = set->range[i].hi;

		for (const SmRange *cut = sm_ranges_after(less, lo); cut && cut < end && cut->lo < hi; cut++)
		{
			if (lo < cut->lo)
				sm_ranges_append(&rest, lo, cut->lo);
			lo = Max(lo, cut->hi);
		}
		if (lo < hi)
			sm_ranges_append(&rest, lo, hi);
	}
	return rest;
}
