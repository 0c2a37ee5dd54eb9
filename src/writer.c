/*
 * writer.c
 *		Headquarters: rows for a table, without a statement for them.
 *
 * Used by central_keep() and central_project(), in the transaction of
 * central_receive(); takes the table's RowExclusiveLock and keeps it.
 *
 * Rows are written as the apply worker of logical replication writes them, with
 * constraints, row triggers and whatever indexes there are; new ones together, as
 * COPY does, unless a trigger wants to see each of them first.  What is inserted
 * is not visible before the caller's next command.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "commands/trigger.h"
#include "lanes.h"
#include "utils/rel.h"
#include "writer.h"

#include "compat.h"

void
sm_writer_open(SmWriter *writer, const char *table, int columns)
{
	TriggerDesc *triggers;

	memset(writer, 0, sizeof(*writer));
	writer->relation = table_open(sm_lanes_relation(table), RowExclusiveLock);
	if (RelationGetNumberOfAttributes(writer->relation) != columns)
		elog(ERROR, "%s has other columns than softmobile knows", table);
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

void
sm_writer_update(SmWriter *writer, TupleTableSlot *old)
{
	TupleTableSlot *slot = writer->slots[writer->n];

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
