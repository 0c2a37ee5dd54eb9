/*
 * captured.c
 *		What the capture trigger knows of a table: its row in captured_table, with
 *		names resolved to column numbers and types to encoders.
 *
 * Called by capture for every row, in the selling transaction, as the selling
 * role.  A description is read once per backend and table and kept until a
 * relcache invalidation of either.  Partitions and inheritance children are
 * described as their nearest attached ancestor says, columns being found by name.
 * Our tables are read with the catalog snapshot, so that a transaction in
 * REPEATABLE READ follows attach() too; AccessShareLock is held for the reading.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "captured.h"
#include "catalog/indexing.h"
#include "catalog/pg_inherits.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "guc.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/hsearch.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"

PG_FUNCTION_INFO_V1(softmobile_captures_changed);

typedef struct CacheEntry
{
	Oid			relid;			/* hash key: the table that the trigger fires on */
	bool		stale;			/* an invalidation arrived, also while filling */
	SmCaptured *captured;		/* NULL: never filled without error */
	MemoryContext cxt;			/* captured and all that it refers to */
} CacheEntry;

static HTAB *cache = NULL;
static Oid	captured_table_relid = InvalidOid;

static void
forget_tables(Datum arg, Oid relid)
{
	HASH_SEQ_STATUS status;
	CacheEntry *entry;

	if (cache == NULL)
		return;
	if (OidIsValid(relid) && relid != captured_table_relid)
	{
		entry = hash_search(cache, &relid, HASH_FIND, NULL);
		if (entry != NULL)
			entry->stale = true;
		return;
	}
	hash_seq_init(&status, cache);
	while ((entry = hash_seq_search(&status)) != NULL)
		entry->stale = true;
}

void
sm_captured_init(void)
{
	CacheRegisterRelcacheCallback(forget_tables, (Datum) 0);
}

/* Parents of a table by pg_inherits: one for a partition, any number else. */
static List *
parents_of(Oid relid)
{
	Relation	inherits = table_open(InheritsRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	List	   *parents = NIL;

	ScanKeyInit(&key, Anum_pg_inherits_inhrelid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(relid));
	scan = systable_beginscan(inherits, InheritsRelidSeqnoIndexId, true, NULL, 1, &key);
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
		parents = lappend_oid(parents, ((Form_pg_inherits) GETSTRUCT(tuple))->inhparent);
	systable_endscan(scan);
	table_close(inherits, AccessShareLock);
	return parents;
}

/* A row of one of our small tables whose column equals an OID or integer; copied, or NULL. */
static HeapTuple
find_row(Relation rel, AttrNumber attnum, RegProcedure equal, Datum value)
{
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;

	ScanKeyInit(&key, attnum, BTEqualStrategyNumber, equal, value);
	scan = systable_beginscan(rel, InvalidOid, false, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
		tuple = heap_copytuple(tuple);
	systable_endscan(scan);
	return tuple;
}

/* captured_table's row for a table or its nearest attached ancestor, breadth first. */
static HeapTuple
find_captured(Relation captured_table, Oid relid)
{
	List	   *level = list_make1_oid(relid);

	while (level != NIL)
	{
		List	   *next = NIL;
		ListCell   *lc;

		foreach(lc, level)
		{
			HeapTuple	tuple = find_row(captured_table, 1, F_OIDEQ, ObjectIdGetDatum(lfirst_oid(lc)));

			if (HeapTupleIsValid(tuple))
				return tuple;
			next = list_concat_unique_oid(next, parents_of(lfirst_oid(lc)));
		}
		level = next;
	}
	return NULL;
}

static Datum
column(HeapTuple tuple, Relation rel, const char *name, bool *isnull)
{
	TupleDesc	desc = RelationGetDescr(rel);

	return heap_getattr(tuple, SPI_fnumber(desc, name), desc, isnull);
}

static AttrNumber
named_column(Relation table, const char *name)
{
	int			attnum = SPI_fnumber(RelationGetDescr(table), name);

	if (attnum <= 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_COLUMN),
				 errmsg("column \"%s\" of table \"%s\" is gone, but softmobile captures by it",
						name, RelationGetRelationName(table)),
				 errhint("Call softmobile.detach() and softmobile.attach() for the table.")));
	return attnum;
}

static AttrNumber
optional_column(Relation table, HeapTuple row, Relation captured_table, const char *which)
{
	bool		isnull;
	Datum		name = column(row, captured_table, which, &isnull);

	return isnull ? 0 : named_column(table, NameStr(*DatumGetName(name)));
}

static AttrNumber *
column_list(Relation table, HeapTuple row, Relation captured_table, const char *which, int *n)
{
	bool		isnull;
	Datum		array = column(row, captured_table, which, &isnull);
	Datum	   *names;
	AttrNumber *result;

	deconstruct_array(DatumGetArrayTypeP(array), NAMEOID, NAMEDATALEN, false, TYPALIGN_CHAR,
					  &names, NULL, n);
	result = palloc(sizeof(AttrNumber) * Max(*n, 1));
	for (int i = 0; i < *n; i++)
		result[i] = named_column(table, NameStr(*DatumGetName(names[i])));
	return result;
}

static const bool *
enabling_setting(HeapTuple entity, Relation entities)
{
	bool		isnull;
	Datum		flag = column(entity, entities, "flag", &isnull);
	char	   *name;

	if (isnull)
		return &sm_enable_hybrid_prep;
	name = TextDatumGetCString(flag);
	if (strcmp(name, "purchases_sales") == 0)
		return &sm_enable_purchases_sales;
	if (strcmp(name, "transfers") == 0)
		return &sm_enable_transfers;
	return &sm_enable_hybrid_prep;
}

/* True when values of a type (no domain) can be counted as an amount. */
static bool
is_amount_type(Oid typid)
{
	switch (typid)
	{
		case INT2OID:
		case INT4OID:
		case INT8OID:
		case FLOAT4OID:
		case FLOAT8OID:
		case NUMERICOID:
			return true;
		default:
			return false;
	}
}

/* What a row of captured_table says of a table. */
static void
describe_table(SmCaptured *captured, Relation table, HeapTuple row, Relation captured_table)
{
	Relation	entities = table_open(sm_lanes_relation("outbox_entity"), AccessShareLock);
	HeapTuple	entity;
	bool		isnull;

	captured->entity_no = DatumGetInt32(column(row, captured_table, "entity_no", &isnull));
	captured->require_reason = DatumGetBool(column(row, captured_table, "require_reason", &isnull));
	captured->keys = column_list(table, row, captured_table, "key_columns", &captured->nkeys);
	captured->branches = column_list(table, row, captured_table, "branch_columns", &captured->nbranches);
	captured->reason = optional_column(table, row, captured_table, "reason_column");
	captured->folio = optional_column(table, row, captured_table, "folio_column");
	captured->amount = optional_column(table, row, captured_table, "amount_column");
	if (captured->amount != 0)
	{
		Oid			typid = getBaseType(TupleDescAttr(RelationGetDescr(table), captured->amount - 1)->atttypid);

		if (!is_amount_type(typid))
			captured->amount = 0;
		captured->amount_is_numeric = typid == NUMERICOID;
	}

	entity = find_row(entities, 1, F_INT4EQ, Int32GetDatum(captured->entity_no));
	if (entity == NULL)
		elog(ERROR, "outbox_entity has no row %d", captured->entity_no);
	captured->priority = sm_lanes_priority(TextDatumGetCString(column(entity, entities, "priority", &isnull)));
	captured->enabled = enabling_setting(entity, entities);
	captured->encoder = sm_encode_create(RelationGetDescr(table), CurrentMemoryContext);
	table_close(entities, AccessShareLock);
}

/* A new description of a table, in the current memory context. */
static SmCaptured *
read_table(Relation table)
{
	Relation	captured_table = table_open(sm_lanes_relation("captured_table"), AccessShareLock);
	SmCaptured *captured = palloc0(sizeof(SmCaptured));
	HeapTuple	row = find_captured(captured_table, RelationGetRelid(table));

	captured_table_relid = RelationGetRelid(captured_table);
	captured->attached = row != NULL;
	if (captured->attached)
		describe_table(captured, table, row, captured_table);
	table_close(captured_table, AccessShareLock);
	return captured;
}

SmCaptured *
sm_captured_find(Relation table)
{
	Oid			relid = RelationGetRelid(table);
	CacheEntry *entry;
	MemoryContext caller;
	bool		found;

	if (cache == NULL)
	{
		HASHCTL		ctl = {.keysize = sizeof(Oid), .entrysize = sizeof(CacheEntry)};

		cache = hash_create("softmobile captured tables", 32, &ctl, HASH_ELEM | HASH_BLOBS);
	}
	entry = hash_search(cache, &relid, HASH_ENTER, &found);
	if (!found)
	{
		entry->captured = NULL;
		entry->cxt = NULL;
	}
	else if (entry->captured != NULL && !entry->stale)
		return entry->captured;

	/* An outer trigger call may be using the old description: it goes with the transaction. */
	if (entry->cxt != NULL)
		MemoryContextSetParent(entry->cxt, TopTransactionContext);
	entry->captured = NULL;
	entry->cxt = AllocSetContextCreate(CacheMemoryContext, "softmobile captured table",
									   ALLOCSET_SMALL_SIZES);
	entry->stale = false;
	caller = MemoryContextSwitchTo(entry->cxt);
	entry->captured = read_table(table);
	MemoryContextSwitchTo(caller);
	return entry->captured;
}

/*
 * softmobile.captures_changed() -> void
 *
 * Makes every backend read captured_table anew; for use in the transaction that
 * changed it.
 */
Datum
softmobile_captures_changed(PG_FUNCTION_ARGS)
{
	CacheInvalidateRelcacheByRelid(sm_lanes_relation("captured_table"));
	PG_RETURN_VOID();
}
