/*
 * logindex.c
 *		New rows of the log in its segment's indexes.
 *
 * Called by eventlog for each flush, in the selling transaction, which holds
 * RowExclusiveLock on the segment; here it gets the same on each index, to the end of
 * the transaction.
 *
 * What a segment has of indexes is kept until an invalidation of the segment or
 * of one of them.  That is early enough: whoever makes an index ready for rows, or
 * drops one, waits for those who hold a lock on the table, and they took that
 * before they looked here.
 *
 * The log's own indexes are the B-tree of its key and the BRIN index on id.  The
 * latter has nothing to learn from a row whose page range is not summarized, and
 * such is the end of a log.  Other indexes may be added, if they are simple.
 */
#include "postgres.h"

#include "access/brin_revmap.h"
#include "access/brin_tuple.h"
#include "access/genam.h"
#include "catalog/index.h"
#include "catalog/pg_am.h"
#include "logindex.h"
#include "storage/bufmgr.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/uuid.h"

#include "compat.h"

typedef struct KnownIndex
{
	Oid			oid;
	bool		summarizes_ids;
	IndexInfo  *info;			/* of B-trees; others may keep more in theirs than a transaction may */
} KnownIndex;

static struct
{
	MemoryContext cxt;
	bool		valid;
	Oid			segment;
	int			n;
	KnownIndex *index;
}			known;

static void
forget_indexes(Datum arg, Oid relid)
{
	bool		concerns = relid == InvalidOid || relid == known.segment;

	for (int i = 0; i < known.n && !concerns; i++)
		concerns = relid == known.index[i].oid;
	if (concerns)
		known.valid = false;
}

void
sm_logindex_init(void)
{
	CacheRegisterRelcacheCallback(forget_indexes, (Datum) 0);
}

static IndexInfo *
build_info(Relation index)
{
	IndexInfo  *info = BuildIndexInfo(index);

	if (info->ii_Expressions != NIL || info->ii_Predicate != NIL || info->ii_ExclusionOps != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("index \"%s\" is of a kind that the outbox cannot have", RelationGetRelationName(index)),
				 errdetail("Expressions, predicates and exclusion constraints are not supported."),
				 errhint("Drop the index.")));
	return info;
}

static void
note_index(KnownIndex *entry, Oid oid)
{
	Relation	index = index_open(oid, RowExclusiveLock);
	MemoryContext caller = MemoryContextSwitchTo(known.cxt);
	IndexInfo  *info = build_info(index);

	entry->oid = oid;
	entry->summarizes_ids = index->rd_rel->relam == BRIN_AM_OID && info->ii_NumIndexAttrs == 1 &&
		info->ii_IndexAttrNumbers[0] == SM_EVENT_ID;
	entry->info = index->rd_rel->relam == BTREE_AM_OID ? info : NULL;
	MemoryContextSwitchTo(caller);
	index_close(index, NoLock);
}

static void
note_indexes(Relation segment)
{
	List	   *oids = RelationGetIndexList(segment);
	ListCell   *lc;

	if (known.cxt == NULL)
		known.cxt = AllocSetContextCreate(CacheMemoryContext, "softmobile log indexes", ALLOCSET_SMALL_SIZES);
	known.n = 0;
	known.valid = false;
	MemoryContextReset(known.cxt);
	known.segment = RelationGetRelid(segment);
	known.index = MemoryContextAllocZero(known.cxt, Max(list_length(oids), 1) * sizeof(KnownIndex));
	foreach(lc, oids)
	{
		note_index(&known.index[known.n], lfirst_oid(lc));
		known.n++;
	}
	known.valid = true;
	list_free(oids);
}

void
sm_logindex_open(SmLogIndexes *indexes, Relation segment)
{
	if (!known.valid || known.segment != RelationGetRelid(segment))
		note_indexes(segment);
	indexes->segment = segment;
	indexes->n = known.n;
	indexes->index = palloc(Max(known.n, 1) * sizeof(SmLogIndex));
	for (int i = 0; i < known.n; i++)
	{
		SmLogIndex *index = &indexes->index[i];

		index->rel = index_open(known.index[i].oid, RowExclusiveLock);
		index->summarizes_ids = known.index[i].summarizes_ids;
		index->info = known.index[i].info;
	}
}

void
sm_logindex_close(SmLogIndexes *indexes)
{
	for (int i = 0; i < indexes->n; i++)
	{
		SmLogIndex *index = &indexes->index[i];

		if (index->info != NULL)
			index_insert_cleanup(index->rel, index->info);
		index_close(index->rel, NoLock);
	}
}

static void
insert_row(const SmLogIndexes *indexes, SmLogIndex *index, TupleTableSlot *slot)
{
	Datum		values[INDEX_MAX_KEYS];
	bool		nulls[INDEX_MAX_KEYS];

	FormIndexDatum(index->info, slot, NULL, values, nulls);
	(void) index_insert(index->rel, values, nulls, &slot->tts_tid, indexes->segment,
						index->info->ii_Unique ? UNIQUE_CHECK_YES : UNIQUE_CHECK_NO, false, index->info);
}

static bool
is_summarized(Relation index, BlockNumber block)
{
	BlockNumber pages_per_range;
	BrinRevmap *revmap = sm_brin_revmap(index, &pages_per_range);
	Buffer		buffer = InvalidBuffer;
	OffsetNumber offset;
	BrinTuple  *tuple = sm_brin_tuple(revmap, block, &buffer, &offset);

	if (tuple != NULL)
		LockBuffer(buffer, BUFFER_LOCK_UNLOCK);
	if (BufferIsValid(buffer))
		ReleaseBuffer(buffer);
	brinRevmapTerminate(revmap);
	return tuple != NULL;
}

static const pg_uuid_t *
id_of(TupleTableSlot *slot)
{
	bool		isnull;

	return DatumGetUUIDP(slot_getattr(slot, SM_EVENT_ID, &isnull));
}

/*
 * The rows of a page, for an index that needs to be told of two of them at most.
 * The first row of all of a page goes there anyway: with it the index has the page
 * range before summarized.
 */
static void
summarize_page(const SmLogIndexes *indexes, SmLogIndex *index, TupleTableSlot **slots, int n)
{
	bool		summarized = is_summarized(index->rel, ItemPointerGetBlockNumber(&slots[0]->tts_tid));
	int			lowest = 0;
	int			highest = 0;

	if (!summarized && ItemPointerGetOffsetNumber(&slots[0]->tts_tid) != FirstOffsetNumber)
		return;
	if (index->info == NULL)
		index->info = build_info(index->rel);
	if (!index->info->ii_ReadyForInserts)
		return;
	for (int k = 1; k < n && summarized; k++)
	{
		if (memcmp(id_of(slots[k]), id_of(slots[lowest]), UUID_LEN) < 0)
			lowest = k;
		if (memcmp(id_of(slots[k]), id_of(slots[highest]), UUID_LEN) > 0)
			highest = k;
	}
	if (lowest != 0)
		insert_row(indexes, index, slots[lowest]);
	if (highest != 0)
		insert_row(indexes, index, slots[highest]);
	if (lowest == 0 || highest == 0)
		insert_row(indexes, index, slots[0]);
}

static void
summarize(const SmLogIndexes *indexes, SmLogIndex *index, TupleTableSlot **slots, int n)
{
	for (int from = 0; from < n;)
	{
		BlockNumber block = ItemPointerGetBlockNumber(&slots[from]->tts_tid);
		int			to = from + 1;

		while (to < n && ItemPointerGetBlockNumber(&slots[to]->tts_tid) == block)
			to++;
		summarize_page(indexes, index, &slots[from], to - from);
		from = to;
	}
}

void
sm_logindex_insert(SmLogIndexes *indexes, TupleTableSlot **slots, int n)
{
	for (int i = 0; i < indexes->n; i++)
	{
		SmLogIndex *index = &indexes->index[i];

		if (index->summarizes_ids)
		{
			summarize(indexes, index, slots, n);
			continue;
		}
		if (index->info == NULL)
			index->info = build_info(index->rel);
		for (int k = 0; k < n && index->info->ii_ReadyForInserts; k++)
			insert_row(indexes, index, slots[k]);
	}
}
