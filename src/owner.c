/*
 * owner.c
 *		Reading an application's table with the rights of the table's owner.
 *
 * Called by our SECURITY DEFINER functions, which run as the owner of the extension, a
 * superuser.  To plan a query on a table is to run code that its owner may have written:
 * index expressions, constraints and partition keys are simplified first.  So the query
 * runs as that owner, in a restricted operation, as VACUUM and ANALYZE do.  What it may
 * call besides PostgreSQL's own functions, grant_triggers() grants.
 *
 * The table is locked before its owner is looked up.  Who has renamed it meanwhile and put
 * something else in its place is read with no more than his own rights.
 */
#include "postgres.h"

#include "access/table.h"
#include "executor/spi.h"
#include "executor/tstoreReceiver.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/rel.h"

PG_FUNCTION_INFO_V1(softmobile_read_as_owner);

/*
 * softmobile.read_as_owner(relation regclass, query text) -> SETOF record
 *
 * The snapshot is the calling statement's.  An ERROR puts user and settings back
 * with the subtransaction that it ends.
 */
Datum
softmobile_read_as_owner(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	char	   *query = text_to_cstring(PG_GETARG_TEXT_PP(1));
	Relation	table = table_open(PG_GETARG_OID(0), AccessShareLock);
	DestReceiver *rows = CreateDestReceiver(DestTuplestore);
	SPIExecuteOptions options = {.read_only = true, .must_return_tuples = true, .dest = rows};
	int			nest;
	Oid			caller;
	int			context;

	InitMaterializedSRF(fcinfo, MAT_SRF_USE_EXPECTED_DESC);
	SetTuplestoreDestReceiverParams(rows, rsinfo->setResult, rsinfo->econtext->ecxt_per_query_memory, false,
									rsinfo->setDesc, "columns of the query are not those expected");

	GetUserIdAndSecContext(&caller, &context);
	SetUserIdAndSecContext(table->rd_rel->relowner, context | SECURITY_RESTRICTED_OPERATION);
	nest = NewGUCNestLevel();
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	if (SPI_execute_extended(query, &options) != SPI_OK_SELECT)
		elog(ERROR, "\"%s\" is no query", query);
	SPI_finish();
	AtEOXact_GUC(false, nest);
	SetUserIdAndSecContext(caller, context);

	rows->rDestroy(rows);
	table_close(table, NoLock);
	return (Datum) 0;
}
