/*
 * lanes.c
 *		Which lane and which segment a new event goes to: this backend's copy of
 *		outbox_lane (current epoch only), branch and outbox_segment.
 *
 * Called by capture in the selling transaction.  The copy is dropped by relcache
 * invalidations of these tables, which whoever changes what matters here sends
 * (softmobile.lanes_changed(), in the changing transaction); the worker's
 * constant updates of delivery state send none.  It is read with the catalog
 * snapshot, so that a transaction in REPEATABLE READ follows a new epoch too,
 * and without SPI, so that the selling role needs no rights on our tables.
 *
 * A transaction must not go on writing to an older epoch's lane after another
 * one has begun to use the newer: sm_lanes_find() therefore accepts pending
 * invalidations first.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/namespace.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "guc.h"
#include "lanes.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/resowner.h"

PG_FUNCTION_INFO_V1(softmobile_lanes_changed);

typedef struct BranchLanes
{
	char		branch[SM_BRANCH_MAX + 1];	/* hash key; '' holds the unregistered lanes */
	bool		known;			/* stands in softmobile.branch */
	SmLaneRef	lane[SM_PRIORITIES];
} BranchLanes;

typedef struct OutboxCache
{
	bool		valid;
	bool		stale;			/* an invalidation arrived, also while loading */
	MemoryContext cxt;
	HTAB	   *branches;
	Oid			lane_relid;
	Oid			branch_relid;
	Oid			segment_relid;
	Oid			log_relid;
	Oid			current_segment;
	TupleDesc	event_desc;
} OutboxCache;

static OutboxCache cache;

static void
forget_outbox(Datum arg, Oid relid)
{
	if (relid == InvalidOid || relid == cache.lane_relid || relid == cache.branch_relid ||
		relid == cache.segment_relid || relid == cache.current_segment)
		cache.stale = true;
}

void
sm_lanes_init(void)
{
	cache.stale = true;
	CacheRegisterRelcacheCallback(forget_outbox, (Datum) 0);
}

Oid
sm_lanes_relation(const char *name)
{
	Oid			relid = get_relname_relid(name, get_namespace_oid("softmobile", true));

	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("relation softmobile.%s does not exist", name),
				 errhint("Run CREATE EXTENSION softmobile in this database.")));
	return relid;
}

SmPriority
sm_lanes_priority(const char *word)
{
	static const char *const words[SM_PRIORITIES] = {"HIGH", "NORMAL", "LOW"};

	for (int i = 0; i < SM_PRIORITIES; i++)
		if (strcmp(word, words[i]) == 0)
			return (SmPriority) i;
	elog(ERROR, "unknown priority \"%s\"", word);
	return SM_NORMAL;
}

/* Calls row() for each row of one of our tables, under the catalog snapshot. */
static void
for_each_row(Oid relid, void (*row) (HeapTuple tuple, TupleDesc desc, void *arg), void *arg)
{
	Relation	rel = table_open(relid, AccessShareLock);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, NULL, 0, NULL);
	HeapTuple	tuple;

	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
		row(tuple, RelationGetDescr(rel), arg);
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
}

static Datum
column(HeapTuple tuple, TupleDesc desc, const char *name, bool *isnull)
{
	return heap_getattr(tuple, SPI_fnumber(desc, name), desc, isnull);
}

/* The newest epoch of each kind: [0] for unregistered branches, [1] for registered. */
static void
note_epoch(HeapTuple tuple, TupleDesc desc, void *arg)
{
	int32	   *newest = arg;
	bool		isnull;
	int32		epoch_no = DatumGetInt32(column(tuple, desc, "epoch_no", &isnull));
	int			kind = DatumGetBool(column(tuple, desc, "registered", &isnull)) ? 1 : 0;

	newest[kind] = Max(newest[kind], epoch_no);
}

static BranchLanes *
enter_branch(const char *branch)
{
	BranchLanes *entry;
	char		key[SM_BRANCH_MAX + 1] = {0};
	bool		found;

	strlcpy(key, branch, sizeof(key));
	entry = hash_search(cache.branches, key, HASH_ENTER, &found);
	if (!found)
	{
		entry->known = false;
		memset(entry->lane, 0, sizeof(entry->lane));
	}
	return entry;
}

static void
note_branch(HeapTuple tuple, TupleDesc desc, void *arg)
{
	bool		isnull;

	enter_branch(TextDatumGetCString(column(tuple, desc, "branch_id", &isnull)))->known = true;
}

static void
note_lane(HeapTuple tuple, TupleDesc desc, void *arg)
{
	const int32 *newest = arg;
	bool		isnull;
	bool		unregistered;
	Datum		branch = column(tuple, desc, "branch_id", &unregistered);
	int32		epoch_no = DatumGetInt32(column(tuple, desc, "epoch_no", &isnull));
	int32		lane_id = DatumGetInt32(column(tuple, desc, "lane_id", &isnull));
	SmPriority	priority;
	char		sequence[NAMEDATALEN];
	SmLaneRef  *lane;

	if (epoch_no != newest[unregistered ? 0 : 1])
		return;
	priority = sm_lanes_priority(TextDatumGetCString(column(tuple, desc, "priority", &isnull)));
	lane = &enter_branch(unregistered ? "" : TextDatumGetCString(branch))->lane[priority];
	snprintf(sequence, sizeof(sequence), "lane_%d_seq", lane_id);
	lane->lane_id = lane_id;
	lane->seqrelid = sm_lanes_relation(sequence);
}

static void
note_segment(HeapTuple tuple, TupleDesc desc, void *arg)
{
	int		   *current = arg;
	bool		isnull;

	if (DatumGetBool(column(tuple, desc, "current", &isnull)))
		*current = DatumGetInt32(column(tuple, desc, "segment", &isnull));
}

static void
note_event_desc(Oid relid)
{
	Relation	rel = table_open(relid, AccessShareLock);
	MemoryContext caller = MemoryContextSwitchTo(cache.cxt);

	cache.event_desc = CreateTupleDescCopy(RelationGetDescr(rel));
	MemoryContextSwitchTo(caller);
	table_close(rel, AccessShareLock);
}

static void
load_outbox(void)
{
	HASHCTL		ctl = {.keysize = SM_BRANCH_MAX + 1, .entrysize = sizeof(BranchLanes)};
	int32		newest[2] = {-1, -1};
	int			segment = 1;
	char		name[NAMEDATALEN];
	BranchLanes *unregistered;

	if (cache.cxt == NULL)
		cache.cxt = AllocSetContextCreate(CacheMemoryContext, "softmobile lanes", ALLOCSET_SMALL_SIZES);
	MemoryContextReset(cache.cxt);
	cache.valid = false;
	cache.stale = false;		/* what arrives from here on counts */
	ctl.hcxt = cache.cxt;
	cache.branches = hash_create("softmobile branches", 16, &ctl, HASH_ELEM | HASH_STRINGS | HASH_CONTEXT);

	cache.lane_relid = sm_lanes_relation("outbox_lane");
	cache.branch_relid = sm_lanes_relation("branch");
	cache.segment_relid = sm_lanes_relation("outbox_segment");
	cache.log_relid = sm_lanes_relation("outbox_event");
	for_each_row(sm_lanes_relation("outbox_epoch"), note_epoch, newest);
	for_each_row(cache.branch_relid, note_branch, NULL);
	for_each_row(cache.lane_relid, note_lane, newest);
	for_each_row(cache.segment_relid, note_segment, &segment);
	snprintf(name, sizeof(name), "outbox_event_%d", segment);
	cache.current_segment = sm_lanes_relation(name);
	note_event_desc(cache.log_relid);

	unregistered = enter_branch("");
	for (int i = 0; i < SM_PRIORITIES; i++)
		if (!OidIsValid(unregistered->lane[i].seqrelid))
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("the outbox has no lanes"),
					 errhint("Call softmobile.open_epoch('repair') as a superuser.")));
	cache.valid = true;
}

static void
refresh_outbox(void)
{
	AcceptInvalidationMessages();
	while (cache.stale || !cache.valid)
		load_outbox();
}

SmLaneRef
sm_lanes_find(const char *branch, SmPriority priority, bool *registered)
{
	char		key[SM_BRANCH_MAX + 1] = {0};
	BranchLanes *entry;

	refresh_outbox();
	strlcpy(key, branch, sizeof(key));
	entry = hash_search(cache.branches, key, HASH_FIND, NULL);

	*registered = entry != NULL && OidIsValid(entry->lane[priority].seqrelid);
	if (*registered)
		return entry->lane[priority];

	if ((entry == NULL || !entry->known) && sm_unknown_branch == SM_UNKNOWN_REFUSE)
		ereport(ERROR,
				(errcode(ERRCODE_FOREIGN_KEY_VIOLATION),
				 errmsg("branch \"%s\" is not registered", branch),
				 errdetail("softmobile.unknown_branch is \"refuse\"."),
				 errhint("Register it: SELECT softmobile.register_branch(%s, 'its name').",
						 quote_literal_cstr(branch))));
	memset(key, 0, sizeof(key));
	entry = hash_search(cache.branches, key, HASH_FIND, NULL);
	return entry->lane[priority];
}

/*
 * A segment may be emptied for its next use once nobody writes to it; so make
 * sure, holding the lock, that the segment still is the current one.
 */
static Oid
lock_segment(void)
{
	for (;;)
	{
		Oid			relid;

		while (cache.stale || !cache.valid)
			load_outbox();
		relid = cache.current_segment;
		LockRelationOid(relid, RowExclusiveLock);
		if (!cache.stale && relid == cache.current_segment)
			return relid;
		UnlockRelationOid(relid, RowExclusiveLock);
	}
}

/* Held to the end of the transaction, whatever savepoint is rolled back to. */
void
sm_lanes_lock_segment(void)
{
	ResourceOwner owner = CurrentResourceOwner;

	CurrentResourceOwner = TopTransactionResourceOwner;
	(void) lock_segment();
	CurrentResourceOwner = owner;
}

Relation
sm_lanes_open_segment(void)
{
	return table_open(lock_segment(), NoLock);
}

/*
 * A row says of which type it is, and the server's newer minor releases (15.20
 * and 17.12 among them) look at it: the type must be that of the log which is
 * there now, not of one that DROP EXTENSION has removed.
 */
TupleDesc
sm_lanes_event_desc(void)
{
	while (cache.stale || !cache.valid)
		load_outbox();
	return cache.event_desc;
}

bool
sm_lanes_log_among(List *relids)
{
	return list_member_oid(relids, cache.log_relid) || list_member_oid(relids, cache.current_segment);
}

/*
 * softmobile.lanes_changed() -> void
 *
 * Makes every backend read lanes, branches and segments anew; for use in the
 * transaction that changed them.
 */
Datum
softmobile_lanes_changed(PG_FUNCTION_ARGS)
{
	CacheInvalidateRelcacheByRelid(sm_lanes_relation("outbox_lane"));
	PG_RETURN_VOID();
}
