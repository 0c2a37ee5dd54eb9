/*
 * conflict.c
 *		resolve_conflict(): somebody decides which version of a row stands.
 *
 * Called in the user's transaction.  52-conflicts.sql says what happens and why
 * branch and central are equal in the end; here is what needs two users.  The
 * function is SECURITY INVOKER: the application's table is read and changed with
 * the caller's rights and search_path.  Our own tables are looked at by internal
 * functions, run as the owner of the extension, which nobody else may call: so
 * nobody can decide for central without bringing central's row into the table.
 *
 * The row is locked before it is compared, and stays locked until commit.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/xact.h"
#include "catalog/pg_proc.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "lanes.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/syscache.h"
#include "utils/typcache.h"
#include "utils/uuid.h"

PG_FUNCTION_INFO_V1(softmobile_resolve_conflict);

#define MAX_ARGS	7

typedef struct Call
{
	const char *sql;
	int			nargs;
	Oid			types[MAX_ARGS];
	Datum		values[MAX_ARGS];
	char		nulls[MAX_ARGS + 1];
} Call;

/* What is to be brought into the branch's table, and what came of it. */
typedef struct Takeover
{
	Oid			owner;			/* of the extension */
	char	   *reason;
	char	   *branch;
	int			entity_no;
	char	   *entity_id;
	SmPriority	priority;
	char		op;				/* of the event in conflict */
	bool		deleted;		/* central has deleted the row */
	Datum		row;			/* jsonb: central's row otherwise */
	Oid			relid;			/* attached table */
	ArrayType  *key_columns;
	ArrayType  *branch_columns;
	Datum		key;			/* jsonb: values of the key columns */

	Oid			target;			/* that is changed */
	bool		found;
	Oid			tableoid;		/* where the row is ... */
	ItemPointerData ctid;		/* ... and which it is */
	const char *change;			/* insert, update, delete */
	Datum		columns;		/* text[] */
	pg_uuid_t	adoption;
} Takeover;

static void
add_arg(Call *call, Oid type, Datum value, bool isnull)
{
	Assert(call->nargs < MAX_ARGS);
	call->types[call->nargs] = type;
	call->values[call->nargs] = value;
	call->nulls[call->nargs] = isnull ? 'n' : ' ';
	call->nargs++;
}

static void
add_text(Call *call, const char *text)
{
	add_arg(call, TEXTOID, text ? CStringGetTextDatum(text) : (Datum) 0, text == NULL);
}

/*
 * Runs a statement as the caller; rows are in SPI_tuptable.  It is parsed under the
 * caller's search_path, so all names in it are qualified.
 */
static uint64
run(Call *call)
{
	int			result = SPI_execute_with_args(call->sql, call->nargs, call->types, call->values, call->nulls, false, 0);

	if (result < 0)
		elog(ERROR, "could not run \"%s\": %s", call->sql, SPI_result_code_string(result));
	return SPI_processed;
}

/*
 * Runs a statement of ours as the owner of the extension, where nothing that the
 * caller may have put into its search_path is found.  An ERROR ends that too.
 */
static uint64
run_as_owner(Call *call, Oid owner)
{
	int			nest = NewGUCNestLevel();
	Oid			caller;
	int			context;
	uint64		processed;

	GetUserIdAndSecContext(&caller, &context);
	SetUserIdAndSecContext(owner, context | SECURITY_LOCAL_USERID_CHANGE);
	(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	processed = run(call);
	AtEOXact_GUC(true, nest);
	SetUserIdAndSecContext(caller, context);
	return processed;
}

static Datum
result(uint64 row, int col, bool *isnull)
{
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, col, isnull);
}

static char *
result_text(uint64 row, int col)
{
	return SPI_getvalue(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, col);
}

/* The owner of this function owns the extension. */
static Oid
function_owner(Oid function)
{
	HeapTuple	tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(function));
	Oid			owner;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for function %u", function);
	owner = ((Form_pg_proc) GETSTRUCT(tuple))->proowner;
	ReleaseSysCache(tuple);
	return owner;
}

/* Checks the call; what is to be brought into the table, if it is for central. */
static void
read_conflict(Takeover *t, FunctionCallInfo fcinfo)
{
	Call		call = {.sql = "SELECT why, branch, entity_no, entity_id, priority, op, central_row, relation, key_columns, branch_columns, key"
	" FROM softmobile.conflict_to_resolve($1, $2, $3)"};
	bool		isnull;

	add_arg(&call, UUIDOID, PG_GETARG_DATUM(0), PG_ARGISNULL(0));
	add_arg(&call, TEXTOID, PG_GETARG_DATUM(1), PG_ARGISNULL(1));
	add_arg(&call, TEXTOID, PG_GETARG_DATUM(2), PG_ARGISNULL(2));
	run_as_owner(&call, t->owner);
	t->reason = result_text(0, 1);
	t->branch = result_text(0, 2);
	t->entity_no = DatumGetInt32(result(0, 3, &isnull));
	t->entity_id = result_text(0, 4);
	t->priority = sm_lanes_priority(result_text(0, 5));
	t->op = DatumGetChar(result(0, 6, &isnull));
	t->row = result(0, 7, &t->deleted);
	t->relid = DatumGetObjectId(result(0, 8, &isnull));
	if (isnull)
		return;					/* for the branch: no table is needed */
	t->key_columns = DatumGetArrayTypeP(result(0, 9, &isnull));
	t->branch_columns = DatumGetArrayTypeP(result(0, 10, &isnull));
	t->key = result(0, 11, &isnull);
}

/* --- text of statements --- */

/* Of a table that is locked, so that it keeps its name. */
static char *
table_name(Oid relid)
{
	return quote_qualified_identifier(get_namespace_name(get_rel_namespace(relid)), get_rel_name(relid));
}

static List *
names(ArrayType *array)
{
	Oid			type = ARR_ELEMTYPE(array);
	Datum	   *elements;
	int			n;
	List	   *list = NIL;

	deconstruct_array(array, type, type == NAMEOID ? NAMEDATALEN : -1, false,
					  type == NAMEOID ? TYPALIGN_CHAR : TYPALIGN_INT, &elements, NULL, &n);
	for (int i = 0; i < n; i++)
		list = lappend(list, type == NAMEOID ? pstrdup(NameStr(*DatumGetName(elements[i]))) : TextDatumGetCString(elements[i]));
	return list;
}

static Form_pg_attribute
find_column(Relation table, const char *name)
{
	int			attnum = SPI_fnumber(RelationGetDescr(table), name);

	if (attnum <= 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_COLUMN),
				 errmsg("column \"%s\" of table \"%s\" is gone", name, RelationGetRelationName(table)),
				 errhint("Somebody is altering the table: try again.")));
	return TupleDescAttr(RelationGetDescr(table), attnum - 1);
}

/* pg_catalog.jsonb_to_record($1) AS v (column type, ...) */
static void
append_values(StringInfo sql, Relation table, List *columns)
{
	ListCell   *lc;

	appendStringInfoString(sql, "pg_catalog.jsonb_to_record($1) AS v (");
	foreach(lc, columns)
	{
		Form_pg_attribute column = find_column(table, lfirst(lc));

		appendStringInfo(sql, "%s%s %s", foreach_current_index(lc) ? ", " : "", quote_identifier(lfirst(lc)),
						 format_type_extended(column->atttypid, column->atttypmod,
											  FORMAT_TYPE_TYPEMOD_GIVEN | FORMAT_TYPE_FORCE_QUALIFY));
	}
	appendStringInfoChar(sql, ')');
}

static void
append_list(StringInfo sql, const char *before, List *columns)
{
	ListCell   *lc;

	foreach(lc, columns)
		appendStringInfo(sql, "%s%s%s", foreach_current_index(lc) ? ", " : "", before, quote_identifier(lfirst(lc)));
}

/* The row that was locked. */
#define THE_ROW " WHERE t.tableoid OPERATOR(pg_catalog.=) $2 AND t.ctid OPERATOR(pg_catalog.=) $3"

static void
add_row_args(Call *call, Takeover *t, Datum values)
{
	add_arg(call, JSONBOID, values, values == (Datum) 0);
	add_arg(call, OIDOID, ObjectIdGetDatum(t->tableoid), false);
	add_arg(call, TIDOID, PointerGetDatum(&t->ctid), false);
}

/* --- steps --- */

/* Locks the branch's row, if it is there. */
static void
lock_row(Takeover *t)
{
	Relation	table = try_table_open(t->relid, AccessShareLock);
	Call		call = {0};
	StringInfoData sql;
	List	   *keys = names(t->key_columns);
	ListCell   *lc;
	uint64		n;

	if (table == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the table of row %s was dropped", t->entity_id),
				 errhint("Resolve the conflict as 'local'.")));
	initStringInfo(&sql);
	appendStringInfoString(&sql, "SELECT t.tableoid, t.ctid, COALESCE(");
	foreach(lc, names(t->branch_columns))
		appendStringInfo(&sql, "NULLIF(pg_catalog.btrim(pg_catalog.jsonb_extract_path_text(pg_catalog.to_jsonb(t.*), %s)), ''), ",
						 quote_literal_cstr(lfirst(lc)));
	appendStringInfo(&sql, "NULL) FROM %s AS t, ", table_name(t->relid));
	append_values(&sql, table, keys);
	foreach(lc, keys)
	{
		Oid			type = find_column(table, lfirst(lc))->atttypid;
		Oid			equals = lookup_type_cache(type, TYPECACHE_EQ_OPR)->eq_opr;
		const char *name = quote_identifier(lfirst(lc));

		if (!OidIsValid(equals))
			ereport(ERROR,
					(errcode(ERRCODE_UNDEFINED_FUNCTION),
					 errmsg("type %s of key column \"%s\" has no equality operator", format_type_be(type), (char *) lfirst(lc)),
					 errhint("Resolve the conflict as 'local'.")));
		appendStringInfoString(&sql, foreach_current_index(lc) ? " AND " : " WHERE ");
		generate_operator_clause(&sql, psprintf("t.%s", name), type, equals, psprintf("v.%s", name), type);
	}
	appendStringInfoString(&sql, " FOR UPDATE OF t");
	call.sql = sql.data;
	add_arg(&call, JSONBOID, t->key, false);
	n = run(&call);
	for (uint64 i = 0; i < n; i++)
	{
		char	   *branch = result_text(i, 3);
		bool		isnull;

		if (branch != NULL && strcmp(branch, t->branch) != 0)
			continue;
		if (t->found)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("table \"%s\" has several rows of key %s", RelationGetRelationName(table), t->entity_id),
					 errhint("Remove what is too much, with a reason, or resolve the conflict as 'local'.")));
		t->found = true;
		t->tableoid = DatumGetObjectId(result(i, 1, &isnull));
		ItemPointerCopy((ItemPointer) DatumGetPointer(result(i, 2, &isnull)), &t->ctid);
	}

	/* Partitions are changed through their root, inheritance children as the tables that they are. */
	t->target = t->found && !get_rel_relispartition(t->tableoid) ? t->tableoid : t->relid;
	table_close(table, NoLock);
}

/* The columns of the target in which central's row has other values than the branch's. */
static List *
differing_columns(Takeover *t, Datum values)
{
	Call		call = {0};
	bool		isnull;

	call.sql = psprintf("SELECT ARRAY(SELECT c.key FROM"
						" pg_catalog.jsonb_each(pg_catalog.to_jsonb(pg_catalog.jsonb_populate_record(t.*, $1))) AS c (key, value)"
						" WHERE c.value OPERATOR(pg_catalog.<>) (pg_catalog.to_jsonb(t.*) OPERATOR(pg_catalog.->) c.key))"
						" FROM %s AS t" THE_ROW, table_name(t->target));
	add_row_args(&call, t, values);
	if (run(&call) != 1)
		elog(ERROR, "a locked row is gone");
	t->columns = result(0, 1, &isnull);
	return names(DatumGetArrayTypeP(t->columns));
}

/* SET list of an update: the columns, or where none differs one that is set to what it is. */
static void
append_update(StringInfo sql, Relation table, List *columns)
{
	ListCell   *lc;

	foreach(lc, columns)
		appendStringInfo(sql, "%s%s = v.%s", foreach_current_index(lc) ? ", " : "",
						 quote_identifier(lfirst(lc)), quote_identifier(lfirst(lc)));
	for (int i = 0; columns == NIL && i < RelationGetNumberOfAttributes(table); i++)
	{
		Form_pg_attribute column = TupleDescAttr(RelationGetDescr(table), i);

		if (column->attisdropped || column->attgenerated != '\0' || column->attidentity == ATTRIBUTE_IDENTITY_ALWAYS)
			continue;
		appendStringInfo(sql, "%s = t.%s", quote_identifier(NameStr(column->attname)), quote_identifier(NameStr(column->attname)));
		break;
	}
}

/* The change that makes the branch's row central's. */
static void
change_row(Takeover *t)
{
	Relation	table = table_open(t->target, AccessShareLock);
	const char *name = table_name(t->target);
	Call		values_call = {.sql = "SELECT \"values\", columns FROM softmobile.values_for($1, $2)"};
	Call		call = {0};
	StringInfoData sql;
	Datum		values = (Datum) 0;
	List	   *columns = NIL;
	bool		isnull;

	initStringInfo(&sql);
	if (!t->deleted)
	{
		add_arg(&values_call, REGCLASSOID, ObjectIdGetDatum(t->target), false);
		add_arg(&values_call, JSONBOID, t->row, false);
		run_as_owner(&values_call, t->owner);
		values = result(0, 1, &isnull);
		t->columns = result(0, 2, &isnull);
		columns = names(DatumGetArrayTypeP(t->columns));
		if (columns == NIL)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("central's row has no column of table \"%s\"", RelationGetRelationName(table)),
					 errhint("Resolve the conflict as 'local'.")));
	}

	if (t->deleted)
	{
		t->change = "delete";
		appendStringInfo(&sql, "DELETE FROM %s AS t" THE_ROW, name);
		add_row_args(&call, t, (Datum) 0);
	}
	else if (t->found)
	{
		t->change = "update";
		columns = differing_columns(t, values);
		appendStringInfo(&sql, "UPDATE %s AS t SET ", name);
		append_update(&sql, table, columns);
		if (columns != NIL)
		{
			appendStringInfoString(&sql, " FROM ");
			append_values(&sql, table, columns);
		}
		appendStringInfoString(&sql, THE_ROW);
		add_row_args(&call, t, values);
	}
	else
	{
		t->change = "insert";
		appendStringInfo(&sql, "INSERT INTO %s (", name);
		append_list(&sql, "", columns);
		appendStringInfoString(&sql, ") OVERRIDING SYSTEM VALUE SELECT ");
		append_list(&sql, "v.", columns);
		appendStringInfoString(&sql, " FROM ");
		append_values(&sql, table, columns);
		add_arg(&call, JSONBOID, values, false);
	}
	call.sql = sql.data;
	if (run(&call) != 1)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table \"%s\" did not take central's row", RelationGetRelationName(table)),
				 errdetail("A trigger or a policy of the table kept the %s from being made.", t->change),
				 errhint("Resolve the conflict as 'local', or let somebody do it whom the table lets change the row.")));
	table_close(table, NoLock);
}

/* The last number that the lane of the entity's next event has given away. */
static int64
last_number(Takeover *t, SmLaneRef *lane)
{
	Call		call = {.sql = "SELECT pg_catalog.pg_sequence_last_value($1)"};
	bool		registered;
	bool		isnull;
	Datum		last;

	*lane = sm_lanes_find(t->branch, t->priority, &registered);
	add_arg(&call, REGCLASSOID, ObjectIdGetDatum(lane->seqrelid), false);
	run_as_owner(&call, t->owner);
	last = result(0, 1, &isnull);
	return isnull ? 0 : DatumGetInt64(last);
}

/* The first event of the entity in a lane after a number; false if there is none. */
static bool
find_adoption(Takeover *t, int lane_id, int64 after)
{
	Call		call = {.sql = "SELECT e.id FROM softmobile.outbox_event e"
		" WHERE e.lane_id = $1 AND e.seq > $2 AND e.entity_no = $3 AND e.entity_id = $4 AND e.op = $5"
	" ORDER BY e.lane_id, e.seq LIMIT 1"};
	bool		isnull;

	add_arg(&call, INT4OID, Int32GetDatum(lane_id), false);
	add_arg(&call, INT8OID, Int64GetDatum(after), false);
	add_arg(&call, INT4OID, Int32GetDatum(t->entity_no), false);
	add_text(&call, t->entity_id);
	add_arg(&call, CHAROID, CharGetDatum(t->change[0]), false);
	if (run_as_owner(&call, t->owner) == 0)
		return false;
	t->adoption = *DatumGetUUIDP(result(0, 1, &isnull));
	return true;
}

/* Brings central's row into the branch's table, with the reason of the decision. */
static void
take_over(Takeover *t)
{
	SmLaneRef	before;
	SmLaneRef	after;
	int64		last;
	int			nest;

	lock_row(t);
	if (!t->found && (t->deleted || t->op != 'd'))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("row %s of table \"%s\" is gone", t->entity_id, get_rel_name(t->relid)),
				 errdetail("It was deleted at the branch after the change that is in conflict, or has another key or branch now."),
				 errhint("Resolve the conflict as 'local': what happened to the row since follows.")));

	last = last_number(t, &before);
	nest = NewGUCNestLevel();
	(void) set_config_option("softmobile.reason", t->reason, PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	change_row(t);
	AtEOXact_GUC(true, nest);

	(void) last_number(t, &after);
	if (!find_adoption(t, before.lane_id, last) &&
		(before.lane_id == after.lane_id || !find_adoption(t, after.lane_id, 0)))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the %s of row %s of table \"%s\" was not captured as a change of this row", t->change, t->entity_id,
						get_rel_name(t->target)),
				 errdetail("Its capture is switched off (softmobile.enable_*, a disabled trigger, session_replication_role), or central's row has another key or branch."),
				 errhint("Switch the capture on, or resolve the conflict as 'local'.")));
}

/*
 * softmobile.resolve_conflict(uuid, text, text) -> conflict_resolution
 */
Datum
softmobile_resolve_conflict(PG_FUNCTION_ARGS)
{
	Takeover	t = {.owner = function_owner(fcinfo->flinfo->fn_oid)};
	Call		call = {.sql = "SELECT softmobile.record_resolution($1, $2, $3, $4, $5, $6, $7)"};
	bool		central;
	bool		isnull;
	Datum		resolution;

	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	read_conflict(&t, fcinfo);
	central = OidIsValid(t.relid);
	if (central)
		take_over(&t);

	add_arg(&call, UUIDOID, PG_GETARG_DATUM(0), false);
	add_arg(&call, TEXTOID, PG_GETARG_DATUM(1), false);
	add_text(&call, t.reason);
	add_arg(&call, REGCLASSOID, ObjectIdGetDatum(t.target), !central);
	add_text(&call, t.change);
	add_arg(&call, TEXTARRAYOID, t.columns, t.columns == (Datum) 0);
	add_arg(&call, UUIDOID, UUIDPGetDatum(&t.adoption), !central);
	run_as_owner(&call, t.owner);
	resolution = SPI_datumTransfer(result(0, 1, &isnull), false, -1);
	SPI_finish();
	PG_RETURN_DATUM(resolution);
}
