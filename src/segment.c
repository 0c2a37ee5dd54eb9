/*
 * segment.c
 *		Emptying a segment of the log, the one way in which events ever leave it.
 *
 * Called by the worker, through softmobile.recycle_segments() and
 * softmobile.shrink_trash() in SQL, which decide what may go and when; runs with
 * the rights of the extension's owner.
 *
 * TRUNCATE leaves no dead rows, but when it commits, PostgreSQL removes the old
 * files whole.  While a file system frees gigabytes, those who sell wait for
 * their WAL.  So the old files of the segment and of its TOAST table become those
 * of softmobile.outbox_trash, which nobody reads, and are cut off there from the
 * end, a piece in each transaction.  All of it is in the catalogs and in the WAL:
 * after a crash, or on a standby, what is left goes the same way.
 *
 * TRUNCATE's lock is waited for no longer than lock_timeout, which
 * recycle_segments() sets to milliseconds: dashboards that read the log would
 * queue behind it (sales do not: they write to another segment).
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/indexing.h"
#include "catalog/pg_class.h"
#include "catalog/storage.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "lanes.h"
#include "segment.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "utils/rel.h"
#include "utils/syscache.h"

#include "compat.h"

PG_FUNCTION_INFO_V1(softmobile_empty_segment);
PG_FUNCTION_INFO_V1(softmobile_shrink_trash);

static bool recycling = false;

/* The transaction that last gave files to outbox_trash: until it has committed they may go back. */
static TransactionId adopted_in = InvalidTransactionId;

bool
sm_segment_recycling(void)
{
	return recycling;
}

/* Files of a relation, and what pg_class knows of what is in them. */
typedef struct Storage
{
	SmRelLocator locator;
	FormData_pg_class form;
} Storage;

static void
close_both(Relation *both, int n)
{
	for (int i = 0; i < n; i++)
		table_close(both[i], NoLock);
}

/*
 * A relation and its TOAST table, in this order; locked, as TRUNCATE would.  Returns
 * how many: 0 if one of them is locked by somebody who is not to be waited for.
 */
static int
open_both(const char *name, bool wait, Relation *both)
{
	Oid			relid = sm_lanes_relation(name);
	int			n;

	for (n = 0; n < 2 && OidIsValid(relid); n++)
	{
		if (wait)
			LockRelationOid(relid, AccessExclusiveLock);
		else if (!ConditionalLockRelationOid(relid, AccessExclusiveLock))
		{
			close_both(both, n);
			return 0;
		}
		both[n] = table_open(relid, NoLock);
		relid = both[n]->rd_rel->reltoastrelid;
	}
	return n;
}

/* Makes files that this transaction would remove those of another relation, which is empty. */
static void
adopt_storage(Oid relid, const Storage *storage)
{
	Relation	pg_class = table_open(RelationRelationId, RowExclusiveLock);
	Relation	rel = relation_open(relid, NoLock);
	HeapTuple	tuple = SearchSysCacheCopy1(RELOID, ObjectIdGetDatum(relid));
	Form_pg_class form;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for relation %u", relid);
	form = (Form_pg_class) GETSTRUCT(tuple);
	RelationDropStorage(rel);
	RelationPreserveStorage(storage->locator, true);
	form->relfilenode = storage->form.relfilenode;
	form->reltablespace = storage->form.reltablespace;
	form->relpages = storage->form.relpages;
	form->reltuples = storage->form.reltuples;
	form->relallvisible = storage->form.relallvisible;
	form->relfrozenxid = storage->form.relfrozenxid;
	form->relminmxid = storage->form.relminmxid;
	relation_close(rel, NoLock);
	CatalogTupleUpdate(pg_class, &tuple->t_self, tuple);
	CommandCounterIncrement();
	heap_freetuple(tuple);
	table_close(pg_class, RowExclusiveLock);
}

/*
 * Whether TRUNCATE has left the files for another relation.  It keeps them, and empties
 * them at once, when this (sub)transaction has made them; two relations with the same
 * files would be the end of the events that come.  Those of an unlogged table end with it.
 */
static bool
has_left(Oid relid, const Storage *storage)
{
	Relation	rel = relation_open(relid, NoLock);
	bool		left = memcmp(&rel->SM_RD_LOCATOR, &storage->locator, sizeof(storage->locator)) != 0 &&
		storage->form.relpersistence == RELPERSISTENCE_PERMANENT;

	relation_close(rel, NoLock);
	return left;
}

static void
truncate_segment(int segment)
{
	char		command[64];

	snprintf(command, sizeof(command), "TRUNCATE ONLY softmobile.outbox_event_%d", segment);
	SPI_connect();
	recycling = true;
	PG_TRY();
	{
		if (SPI_execute(command, false, 0) != SPI_OK_UTILITY)
			elog(ERROR, "could not truncate segment %d", segment);
	}
	PG_FINALLY();
	{
		recycling = false;
	}
	PG_END_TRY();
	SPI_finish();
}

/*
 * softmobile.empty_segment(integer) -> void
 *
 * Errors: 55P03 when somebody reads the segment; 55000 when the files of the one
 * before are not gone yet.
 */
Datum
softmobile_empty_segment(PG_FUNCTION_ARGS)
{
	int32		segment = PG_GETARG_INT32(0);
	char		name[NAMEDATALEN];
	Relation	old[2];
	Relation	trash[2];
	Storage		storage[2];
	Oid			segments[2];
	Oid			heirs[2];
	int			n;

	if (segment < 1 || segment > 4)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("there is no segment %d", segment)));
	snprintf(name, sizeof(name), "outbox_event_%d", segment);
	n = open_both(name, true, old);
	if (open_both("outbox_trash", true, trash) != n)
		elog(ERROR, "outbox_trash is not like %s", name);
	for (int i = 0; i < n; i++)
	{
		if (RelationGetNumberOfBlocks(trash[i]) > 0)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("the files of the segment that was emptied before are still being removed"),
					 errhint("The worker removes them, a piece at a time.")));
		storage[i].locator = old[i]->SM_RD_LOCATOR;
		memcpy(&storage[i].form, old[i]->rd_rel, CLASS_TUPLE_SIZE);
		segments[i] = RelationGetRelid(old[i]);
		heirs[i] = RelationGetRelid(trash[i]);
	}
	close_both(old, n);
	close_both(trash, n);

	adopted_in = GetTopTransactionId();
	truncate_segment(segment);
	for (int i = 0; i < n; i++)
		if (has_left(segments[i], &storage[i]))
			adopt_storage(heirs[i], &storage[i]);
	PG_RETURN_VOID();
}

/*
 * softmobile.shrink_trash(integer) -> boolean
 *
 * Cuts up to so many blocks off what emptied segments have left; true: something
 * is left.  A cut is not undone by a rollback.
 */
Datum
softmobile_shrink_trash(PG_FUNCTION_ARGS)
{
	BlockNumber most = Max(PG_GETARG_INT32(0), 1);
	BlockNumber left = 0;
	Relation	trash[2];
	int			n;

	if (TransactionIdIsValid(adopted_in) && TransactionIdEquals(adopted_in, GetTopTransactionIdIfAny()))
		PG_RETURN_BOOL(true);
	/* Whoever has it locked, the worker does not wait for. */
	n = open_both("outbox_trash", false, trash);
	if (n == 0)
		PG_RETURN_BOOL(true);
	for (int i = 0; i < n; i++)
	{
		BlockNumber size = RelationGetNumberOfBlocks(trash[i]);
		BlockNumber cut = Min(size, most);

		if (cut > 0)
			RelationTruncate(trash[i], size - cut);
		most -= cut;
		left += size - cut;
	}
	close_both(trash, n);
	PG_RETURN_BOOL(left > 0);
}
