/*
 * project.c
 *		Headquarters: a batch's events become the latest rows of their entities.
 *
 * Called by softmobile.central_receive(), in its transaction, with the branches of
 * the events locked: nobody else writes their rows of central_projection.
 *
 * Only entities with which all is as usual are written here; the others are
 * returned, for central_apply() to look at one by one.  A statement for it would
 * carry every row through a sort, two windows and a join, for as long as the
 * writing itself takes.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "receive.h"
#include "utils/fmgroids.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "writer.h"

#include "compat.h"

PG_FUNCTION_INFO_V1(softmobile_central_project);

/* Columns of softmobile.central_projection. */
enum
{
	ROW_BRANCH_ID, ROW_ENTITY_TYPE, ROW_ENTITY_ID, ROW_SEQ, ROW_CHANGED_AT, ROW_EPOCH_NO, ROW_DELETED, ROW_CHANGED_HERE, ROW_ROW, ROW_COLUMNS
};

static const Oid column_types[ROW_COLUMNS] = {
	[ROW_BRANCH_ID] = TEXTOID,
	[ROW_ENTITY_TYPE] = TEXTOID,
	[ROW_ENTITY_ID] = TEXTOID,
	[ROW_SEQ] = INT8OID,
	[ROW_CHANGED_AT] = TIMESTAMPTZOID,
	[ROW_EPOCH_NO] = INT4OID,
	[ROW_DELETED] = BOOLOID,
	[ROW_CHANGED_HERE] = BOOLOID,
	[ROW_ROW] = JSONBOID
};

/* An event; its values lie in the array that it came in. */
typedef struct Change
{
	int			group;			/* same branch and entity type: same number */
	Datum		key[3];			/* branch, entity type, entity id */
	int			n;
	int			order_epoch;
	int64		seq;
	char		op;				/* 'i', 'u', 'd' */
	bool		decided;		/* by a person: has a resolution */
	Jsonb	   *new;			/* NULL: none */
	Jsonb	   *old;
} Change;

/*
 * The projection, opened for reading by key and for writing.  Entities are looked
 * up in the order of the index, so that the next one is often the index's next
 * entry, or is not there because that entry is behind it already.
 */
typedef struct Projection
{
	SmWriter	writer;
	Relation	index;
	IndexScanDesc scan;
	ScanKeyData keys[3];
	ItemPointer entry;			/* where the scan stands; NULL: at its end */
	int			group;			/* that it is in */
	bool		exact;			/* it sees one entity only */
	int			lookups;		/* in this group */
	int			seeks;			/* of them, those that descended the index */
	TupleTableSlot *held;		/* central's row of the entity */
	MemoryContext cxt;			/* for what is looked at of one entity */
} Projection;

/* Entries passed over before the index is descended anew, and lookups before it is judged whether walking pays. */
#define MAX_STEPS	2
#define TRIAL		16

static int
compare_texts(Datum a, Datum b)
{
	text	   *x = DatumGetTextPP(a);
	text	   *y = DatumGetTextPP(b);
	int			x_len = VARSIZE_ANY_EXHDR(x);
	int			y_len = VARSIZE_ANY_EXHDR(y);
	int			result = memcmp(VARDATA_ANY(x), VARDATA_ANY(y), Min(x_len, y_len));

	return result != 0 ? result : x_len - y_len;
}

/* By entity, within a group as the index has them (collation "C"). */
static int
compare_entities(const Change *a, const Change *b)
{
	return a->group != b->group ? a->group - b->group : compare_texts(a->key[2], b->key[2]);
}

static int
compare_order(int a_epoch, int64 a_seq, int b_epoch, int64 b_seq)
{
	if (a_epoch != b_epoch)
		return a_epoch < b_epoch ? -1 : 1;
	return a_seq < b_seq ? -1 : a_seq > b_seq;
}

static int
compare_changes(const void *a, const void *b)
{
	const Change *x = a;
	const Change *y = b;
	int			result = compare_entities(x, y);

	return result != 0 ? result : compare_order(x->order_epoch, x->seq, y->order_epoch, y->seq);
}

/* The number of a change's branch and entity type; new ones get the next. */
static int
find_group(List **groups, Change *c)
{
	ListCell   *lc;

	foreach(lc, *groups)
	{
		const Change *other = lfirst(lc);

		if (compare_texts(other->key[1], c->key[1]) == 0 && compare_texts(other->key[0], c->key[0]) == 0)
			return foreach_current_index(lc);
	}
	*groups = lappend(*groups, c);
	return list_length(*groups) - 1;
}

/* The events, sorted by entity and order. */
static Change *
read_changes(const SmEventRows *events)
{
	Change	   *changes = palloc(sizeof(Change) * Max(events->n, 1));
	List	   *groups = NIL;	/* of Change, the first of each */

	for (int i = 0; i < events->n; i++)
	{
		Datum		values[SM_EVENT_COLUMNS];
		bool		nulls[SM_EVENT_COLUMNS];

		sm_event_rows_get(events, i, values, nulls);
		if (nulls[SM_EVENT_BRANCH_ID] || nulls[SM_EVENT_ENTITY_TYPE] || nulls[SM_EVENT_ENTITY_ID] || nulls[SM_EVENT_OP] ||
			nulls[SM_EVENT_SEQ] || nulls[SM_EVENT_ORDER_EPOCH] || nulls[SM_EVENT_N])
			elog(ERROR, "an event without an entity or a number");
		if ((*VARDATA_ANY(DatumGetTextPP(values[SM_EVENT_OP])) != 'd' && nulls[SM_EVENT_NEW]) ||
			(*VARDATA_ANY(DatumGetTextPP(values[SM_EVENT_OP])) != 'i' && nulls[SM_EVENT_OLD]))
			elog(ERROR, "an event without its rows");
		changes[i] = (Change)
		{
			.key = {values[SM_EVENT_BRANCH_ID], values[SM_EVENT_ENTITY_TYPE], values[SM_EVENT_ENTITY_ID]},
			.n = DatumGetInt32(values[SM_EVENT_N]),
			.order_epoch = DatumGetInt32(values[SM_EVENT_ORDER_EPOCH]),
			.seq = DatumGetInt64(values[SM_EVENT_SEQ]),
			.op = *VARDATA_ANY(DatumGetTextPP(values[SM_EVENT_OP])),
			.decided = !nulls[SM_EVENT_RESOLUTION],
			.new = nulls[SM_EVENT_NEW] ? NULL : DatumGetJsonbP(values[SM_EVENT_NEW]),
			.old = nulls[SM_EVENT_OLD] ? NULL : DatumGetJsonbP(values[SM_EVENT_OLD]),
		};
		changes[i].group = find_group(&groups, &changes[i]);
	}
	qsort(changes, events->n, sizeof(Change), compare_changes);
	return changes;
}

/* false: the table is not as it was made, and left to central_apply(). */
static bool
open_projection(Projection *p)
{
	SmWriter   *w = &p->writer;

	memset(p, 0, sizeof(*p));
	if (!sm_writer_open(w, "central_projection", column_types, ROW_COLUMNS))
		return false;
	list_free(RelationGetIndexList(w->relation));	/* finds the primary key */
	for (int i = 0; i < w->target->ri_NumIndices; i++)
		if (RelationGetRelid(w->target->ri_IndexRelationDescs[i]) == w->relation->rd_pkindex)
			p->index = w->target->ri_IndexRelationDescs[i];
	if (p->index == NULL)
		elog(ERROR, "central_projection has no primary key");
	p->scan = index_beginscan(w->relation, p->index, GetActiveSnapshot(), NULL, lengthof(p->keys), 0);
	p->scan->xs_want_itup = true;
	p->group = -1;
	p->held = table_slot_create(w->relation, &w->estate->es_tupleTable);
	p->cxt = AllocSetContextCreate(CurrentMemoryContext, "softmobile entity", ALLOCSET_DEFAULT_SIZES);
	return true;
}

static void
close_projection(Projection *p)
{
	index_endscan(p->scan);
	sm_writer_close(&p->writer);
	MemoryContextDelete(p->cxt);
}

static void
next_entry(Projection *p)
{
	p->entry = index_getnext_tid(p->scan, ForwardScanDirection);
}

/* Where the entry stands to an entity of the group: < 0 before it. */
static int
compare_entry(const Projection *p, const Change *c)
{
	bool		isnull;

	return compare_texts(index_getattr(p->scan->xs_itup, lengthof(p->keys), RelationGetDescr(p->index), &isnull), c->key[2]);
}

/* Descends the index to the entity, or to what stands where it would be. */
static void
seek(Projection *p, const Change *c)
{
	if (p->group != c->group)
	{
		p->group = c->group;
		p->lookups = p->seeks = 0;
	}
	p->seeks++;
	/* Where entities lie far from each other, what stands behind one is of no use. */
	p->exact = p->lookups >= TRIAL && p->seeks > p->lookups / 2;
	for (int i = 0; i < lengthof(p->keys); i++)
	{
		bool		from = i == lengthof(p->keys) - 1 && !p->exact;

		ScanKeyEntryInitialize(&p->keys[i], 0, i + 1, from ? BTGreaterEqualStrategyNumber : BTEqualStrategyNumber,
							   TEXTOID, C_COLLATION_OID, from ? F_TEXT_GE : F_TEXTEQ, c->key[i]);
	}
	index_rescan(p->scan, p->keys, lengthof(p->keys), NULL, 0);
	next_entry(p);
}

/* Looks an entity's row up; false: there is none. */
static bool
find_row(Projection *p, const Change *c)
{
	if (p->exact || p->group != c->group)
		seek(p, c);
	else
	{
		for (int step = 0; p->entry != NULL && compare_entry(p, c) < 0; step++)
		{
			if (step == MAX_STEPS)
			{
				seek(p, c);
				break;
			}
			next_entry(p);
		}
	}
	p->lookups++;

	for (; p->entry != NULL && compare_entry(p, c) == 0; next_entry(p))
		if (index_fetch_heap(p->scan, p->held))
		{
			slot_getallattrs(p->held);
			return true;
		}
	return false;
}

static bool
jsonb_differ(Jsonb *a, Jsonb *b)
{
	return compareJsonbContainers(&a->root, &b->root) != 0;
}

/* Would the old values change the row? */
static bool
old_differs(Jsonb *held, Jsonb *old)
{
	return jsonb_differ(held, DatumGetJsonbP(DirectFunctionCall2(jsonb_concat, JsonbPGetDatum(held), JsonbPGetDatum(old))));
}

/*
 * Whether the row held (NULL: none) is another one than the event changes.  Quick
 * and strict; central_differences() has the last word.
 */
static bool
differs(const Change *c, Jsonb *held)
{
	switch (c->op)
	{
		case 'i':
			return held != NULL && jsonb_differ(held, c->new);
		case 'u':
			return held == NULL || (old_differs(held, c->old) && jsonb_differ(held, c->new));
		default:
			return held != NULL && old_differs(held, c->old);
	}
}

/* Whether the first event of an entity is what central's row lets expect, if there is one. */
static bool
fits_held(const Change *c, TupleTableSlot *held)
{
	if (DatumGetBool(held->tts_values[ROW_CHANGED_HERE]) ||
		compare_order(c->order_epoch, c->seq, DatumGetInt32(held->tts_values[ROW_EPOCH_NO]), DatumGetInt64(held->tts_values[ROW_SEQ])) <= 0)
		return false;
	return !differs(c, held->tts_isnull[ROW_ROW] ? NULL : DatumGetJsonbP(held->tts_values[ROW_ROW]));
}

/* Whether it is what the event before it in the batch lets expect. */
static bool
fits_previous(const Change *c, const Change *previous)
{
	return compare_order(c->order_epoch, c->seq, previous->order_epoch, previous->seq) > 0 && !differs(c, previous->new);
}

/* Writes the row that an entity's last event leaves. */
static void
write_row(Projection *p, const Change *c, bool known)
{
	TupleTableSlot *slot = sm_writer_slot(&p->writer);
	Jsonb	   *row = c->op == 'd' ? NULL : c->new;

	slot->tts_values[ROW_BRANCH_ID] = c->key[0];
	slot->tts_values[ROW_ENTITY_TYPE] = c->key[1];
	slot->tts_values[ROW_ENTITY_ID] = c->key[2];
	slot->tts_values[ROW_SEQ] = Int64GetDatum(c->seq);
	slot->tts_values[ROW_CHANGED_AT] = TimestampTzGetDatum(GetCurrentTransactionStartTimestamp());
	slot->tts_values[ROW_EPOCH_NO] = Int32GetDatum(c->order_epoch);
	slot->tts_values[ROW_DELETED] = BoolGetDatum(row == NULL);
	slot->tts_values[ROW_CHANGED_HERE] = BoolGetDatum(false);
	slot->tts_values[ROW_ROW] = PointerGetDatum(row);
	slot->tts_isnull[ROW_ROW] = row == NULL;

	if (known)
		sm_writer_update(&p->writer, p->held);
	else
		sm_writer_insert(&p->writer);
}

/* One entity's events: true when they were as usual, and are written. */
static bool
project_entity(Projection *p, const Change *changes, int n)
{
	bool		known = find_row(p, &changes[0]);
	MemoryContext caller = MemoryContextSwitchTo(p->cxt);
	bool		usual = true;

	for (int i = 0; i < n && usual; i++)
	{
		if (changes[i].decided)
			usual = false;
		else if (i > 0)
			usual = fits_previous(&changes[i], &changes[i - 1]);
		else if (known)
			usual = fits_held(&changes[i], p->held);
	}
	MemoryContextSwitchTo(caller);
	MemoryContextReset(p->cxt);
	if (usual)
		write_row(p, &changes[n - 1], known);
	return usual;
}

/* softmobile.central_project(events softmobile.central_event[]) -> integer[], the places of the events that are unusual */
Datum
softmobile_central_project(PG_FUNCTION_ARGS)
{
	SmEventRows events;
	Change	   *changes;
	Datum	   *unusual;
	int			n_unusual = 0;
	Projection	projection;
	bool		open;

	sm_event_rows_open(&events, PG_GETARG_ARRAYTYPE_P(0));
	changes = read_changes(&events);
	unusual = palloc(sizeof(Datum) * Max(events.n, 1));
	open = open_projection(&projection);
	for (int from = 0, to; from < events.n; from = to)
	{
		for (to = from + 1; to < events.n && compare_entities(&changes[from], &changes[to]) == 0; to++)
			;
		if (!open || !project_entity(&projection, changes + from, to - from))
			for (int i = from; i < to; i++)
				unusual[n_unusual++] = Int32GetDatum(changes[i].n);
	}
	if (open)
		close_projection(&projection);
	sm_event_rows_close(&events);
	CommandCounterIncrement();	/* central_apply() shall see it */

	if (n_unusual == 0)
		PG_RETURN_NULL();
	PG_RETURN_ARRAYTYPE_P(construct_array(unusual, n_unusual, INT4OID, sizeof(int32), true, TYPALIGN_INT));
}
