/*
 * writer.c
 *		Headquarters: rows for a table, without a statement for them.
 *
 * Used by central_write() and central_project(), in the transaction of
 * central_receive(); takes the table's RowExclusiveLock and keeps it.
 *
 * Rows are written as the apply worker of logical replication writes them, with
 * constraints, row triggers and whatever indexes there are; new ones together, as
 * COPY does, unless a trigger wants to see each of them first.  What is inserted
 * is not visible before the caller's next command.
 *
 * Headquarters may have made something else of a table: partitions, columns of
 * other types or more of them, rules, policies, triggers of whole statements, with
 * transition tables or of single columns.  Those are left to PostgreSQL's executor.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_trigger.h"
#include "commands/trigger.h"
#include "lanes.h"
#include "utils/rel.h"
#include "utils/rls.h"
#include "utils/snapmgr.h"
#include "writer.h"

#include "compat.h"

/* Whether rows that are written here are as a statement would have written them. */
static bool
is_plain(Relation relation, const Oid *types, int columns)
{
	TupleDesc	desc = RelationGetDescr(relation);
	TriggerDesc *triggers = relation->trigdesc;

	if (relation->rd_rel->relkind != RELKIND_RELATION || relation->rd_rules != NULL || desc->natts != columns ||
		check_enable_rls(RelationGetRelid(relation), InvalidOid, true) == RLS_ENABLED)
		return false;
	for (int i = 0; i < columns; i++)
		if (TupleDescAttr(desc, i)->atttypid != types[i] || TupleDescAttr(desc, i)->attgenerated)
			return false;
	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		const Trigger *trigger = &triggers->triggers[i];

		if (!TRIGGER_FOR_ROW(trigger->tgtype) || trigger->tgnattr > 0 ||
			trigger->tgnewtable != NULL || trigger->tgoldtable != NULL)
			return false;
	}
	return true;
}

bool
sm_writer_open(SmWriter *writer, const char *table, const Oid *types, int columns)
{
	TriggerDesc *triggers;

	memset(writer, 0, sizeof(*writer));
	writer->relation = table_open(sm_lanes_relation(table), RowExclusiveLock);
	if (!is_plain(writer->relation, types, columns))
	{
		table_close(writer->relation, NoLock);
		return false;
	}
	triggers = writer->relation->trigdesc;
	writer->together = triggers == NULL || !triggers->trig_insert_before_row;

	writer->estate = CreateExecutorState();
	writer->estate->es_output_cid = GetCurrentCommandId(true);
	writer->target = makeNode(ResultRelInfo);
	InitResultRelInfo(writer->target, writer->relation, 0, NULL, 0);
	writer->estate->es_opened_result_relations = list_make1(writer->target);	/* triggers look for it there */
	ExecOpenIndices(writer->target, false);
	EvalPlanQualInit(&writer->epq, writer->estate, NULL, NIL, -1, NIL);
	AfterTriggerBeginQuery();
	return true;
}

TupleTableSlot *
sm_writer_slot(SmWriter *writer)
{
	TupleTableSlot *slot = writer->slots[writer->n];

	if (slot == NULL)
		slot = writer->slots[writer->n] = table_slot_create(writer->relation, &writer->estate->es_tupleTable);
	ExecClearTuple(slot);
	memset(slot->tts_isnull, 0, sizeof(bool) * slot->tts_tupleDescriptor->natts);
	return slot;
}

/* Writes the rows that wait. */
static void
flush(SmWriter *writer)
{
	ResultRelInfo *target = writer->target;
	EState	   *estate = writer->estate;
	MemoryContext caller;

	if (writer->n == 0)
		return;
	caller = MemoryContextSwitchTo(GetPerTupleMemoryContext(estate));
	table_multi_insert(writer->relation, writer->slots, writer->n, estate->es_output_cid, 0, NULL);
	MemoryContextSwitchTo(caller);
	for (int i = 0; i < writer->n; i++)
	{
		List	   *recheck = sm_insert_index_tuples(target, writer->slots[i], estate);

		ExecARInsertTriggers(estate, target, writer->slots[i], recheck, NULL);
		list_free(recheck);
		ExecClearTuple(writer->slots[i]);
	}
	ResetPerTupleExprContext(estate);
	writer->n = 0;
}

void
sm_writer_insert(SmWriter *writer)
{
	TupleTableSlot *slot = writer->slots[writer->n];

	ExecStoreVirtualTuple(slot);
	if (!writer->together)
	{
		ExecSimpleRelationInsert(writer->target, writer->estate, slot);
		ResetPerTupleExprContext(writer->estate);
		return;
	}
	slot->tts_tableOid = RelationGetRelid(writer->relation);
	if (writer->relation->rd_att->constr)
		ExecConstraints(writer->target, slot, writer->estate);
	/* What the row refers to is the caller's, and may be gone when it is written. */
	ExecMaterializeSlot(slot);
	ResetPerTupleExprContext(writer->estate);
	if (++writer->n == SM_WRITER_ROWS)
		flush(writer);
}

/*
 * Locks a row that was read.  A trigger that comes before the update would have
 * PostgreSQL look at the row again if somebody is just changing it (against the rules:
 * without the branch's lock), and there is no plan to look at it with.
 */
static void
lock_row(SmWriter *writer, TupleTableSlot *old)
{
	TupleTableSlot *locked = table_slot_create(writer->relation, NULL);
	TM_FailureData failure;

	if (table_tuple_lock(writer->relation, &old->tts_tid, GetActiveSnapshot(), locked, GetCurrentCommandId(false),
						 LockTupleNoKeyExclusive, LockWaitBlock, 0, &failure) != TM_Ok)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("a row of %s was changed meanwhile", RelationGetRelationName(writer->relation))));
	ExecDropSingleTupleTableSlot(locked);
}

void
sm_writer_update(SmWriter *writer, TupleTableSlot *old)
{
	TupleTableSlot *slot = writer->slots[writer->n];
	TriggerDesc *triggers = writer->relation->trigdesc;

	if (triggers != NULL && triggers->trig_update_before_row)
		lock_row(writer, old);
	ExecStoreVirtualTuple(slot);
	EvalPlanQualSetSlot(&writer->epq, old);
	ExecSimpleRelationUpdate(writer->target, writer->estate, &writer->epq, old, slot);
	ResetPerTupleExprContext(writer->estate);
}

void
sm_writer_close(SmWriter *writer)
{
	flush(writer);
	AfterTriggerEndQuery(writer->estate);
	EvalPlanQualEnd(&writer->epq);
	ExecCloseIndices(writer->target);
	ExecResetTupleTable(writer->estate->es_tupleTable, false);
	FreeExecutorState(writer->estate);
	table_close(writer->relation, NoLock);
}
