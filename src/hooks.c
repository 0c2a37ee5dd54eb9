/*
 * hooks.c
 *		Commands of others that workers must make way for, or learn of.
 *
 * DROP DATABASE, RENAME, SET TABLESPACE and CREATE DATABASE ... TEMPLATE need a
 * database without connections, and no server ends a background worker for them.
 * So the worker is stopped first, if the user could run the command at all, and
 * kept out to the end of the transaction: that is how long the command locks the
 * database.  If the command fails the worker comes back at once.
 *
 * What launcher and worker must learn takes effect when it is committed: new and
 * changed databases, CREATE EXTENSION (its script calls poke_launcher()), DROP
 * EXTENSION in whatever way, COMMIT PREPARED.
 *
 * Commands that would lose undelivered events are refused here (guard.c).
 *
 * All of this works when the library is preloaded, as is the worker.  Else a
 * backend that has loaded it watches what is dropped, and nothing more.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_database.h"
#include "catalog/pg_extension.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "commands/extension.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/memutils.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "guard.h"
#include "hooks.h"
#include "process.h"
#include "shmem.h"

/* A worker leaves within milliseconds; this is for one that is stuck. */
#define LEAVE_TIMEOUT_MS 10000

/* What the end of the current transaction has to do. */
static List *held_databases = NIL;	/* release them, in any case */
static bool poke_worker = false;	/* at commit: this database's worker */
static bool poke_launcher = false;	/* at commit: launcher, this database changed */
static bool poke_list = false;	/* at commit: launcher, the databases changed */

static ProcessUtility_hook_type prev_utility_hook = NULL;
static object_access_hook_type prev_access_hook = NULL;

PG_FUNCTION_INFO_V1(softmobile_poke_launcher);

/* ----------
 * The end of the transaction
 * ----------
 */

static void
release_latest(void)
{
	Oid			dbid = llast_oid(held_databases);

	held_databases = list_delete_last(held_databases);
	sm_shmem_release(dbid);
}

/*
 * Release and poke.  After a PREPARE nothing is committed yet, but this backend
 * will not see the end of it: COMMIT PREPARED pokes.
 */
static void
end_transaction(XactEvent event, void *arg)
{
	if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT &&
		event != XACT_EVENT_PREPARE)
		return;

	while (held_databases != NIL)
		release_latest();
	if (event == XACT_EVENT_COMMIT)
	{
		if (poke_worker)
			sm_shmem_poke(MyDatabaseId);
		if (poke_launcher)
			sm_shmem_poke_launcher(MyDatabaseId);
		if (poke_list)
			sm_shmem_poke_launcher(InvalidOid);
	}
	poke_worker = poke_launcher = poke_list = false;
}

static void
await_transaction_end(void)
{
	static bool registered = false;

	if (!registered)
		RegisterXactCallback(end_transaction, NULL);
	registered = true;
}

/*
 * softmobile.poke_launcher(): this database may have got the extension.  For the
 * install script.
 */
Datum
softmobile_poke_launcher(PG_FUNCTION_ARGS)
{
	await_transaction_end();
	poke_launcher = true;
	PG_RETURN_VOID();
}

/* ----------
 * Commands that need a database to themselves
 * ----------
 */

static const DefElem *
find_option(const List *options, const char *name)
{
	ListCell   *lc;

	foreach(lc, options)
	{
		const DefElem *option = lfirst_node(DefElem, lc);

		if (strcmp(option->defname, name) == 0 && option->arg != NULL)
			return option;
	}
	return NULL;
}

/* As have_createdb_privilege(), which early minor releases keep to themselves. */
static bool
may_create_databases(void)
{
	HeapTuple	tuple;
	bool		result;

	if (superuser())
		return true;
	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(GetUserId()));
	if (!HeapTupleIsValid(tuple))
		return false;
	result = ((Form_pg_authid) GETSTRUCT(tuple))->rolcreatedb;
	ReleaseSysCache(tuple);
	return result;
}

/* May the current user copy a database?  As createdb() has it. */
static bool
may_copy(Oid dbid)
{
	HeapTuple	tuple;
	bool		is_template;

	if (!may_create_databases())
		return false;
	if (object_ownercheck(DatabaseRelationId, dbid, GetUserId()))
		return true;
	tuple = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(dbid));
	if (!HeapTupleIsValid(tuple))
		return false;
	is_template = ((Form_pg_database) GETSTRUCT(tuple))->datistemplate;
	ReleaseSysCache(tuple);
	return is_template;
}

/*
 * The database that a command needs without connections; InvalidOid if it is no
 * such command, or one that will be refused anyway.
 */
static Oid
database_needed(const Node *command)
{
	const char *name = NULL;
	const DefElem *option;
	Oid			dbid;

	switch (nodeTag(command))
	{
		case T_DropdbStmt:
			name = ((const DropdbStmt *) command)->dbname;
			break;
		case T_RenameStmt:
			if (((const RenameStmt *) command)->renameType == OBJECT_DATABASE)
				name = ((const RenameStmt *) command)->subname;
			break;
		case T_AlterDatabaseStmt:
			if (find_option(((const AlterDatabaseStmt *) command)->options,
							"tablespace"))
				name = ((const AlterDatabaseStmt *) command)->dbname;
			break;
		case T_CreatedbStmt:
			option = find_option(((const CreatedbStmt *) command)->options, "template");
			dbid = get_database_oid(option ? defGetString((DefElem *) option) : "template1", true);
			return OidIsValid(dbid) && may_copy(dbid) ? dbid : InvalidOid;
		default:
			break;
	}

	if (name == NULL)
		return InvalidOid;
	dbid = get_database_oid(name, true);
	if (!OidIsValid(dbid) || dbid == MyDatabaseId ||
		!object_ownercheck(DatabaseRelationId, dbid, GetUserId()))
		return InvalidOid;
	return dbid;
}

/* Stop the process of a database; true: the end of the transaction releases it. */
static bool
hold_database(Oid dbid)
{
	MemoryContext old_context;

	if (!OidIsValid(dbid))
		return false;

	await_transaction_end();
	old_context = MemoryContextSwitchTo(TopMemoryContext);
	held_databases = lappend_oid(held_databases, dbid);
	MemoryContextSwitchTo(old_context);

	if (sm_shmem_hold(dbid))
		return true;
	held_databases = list_delete_last(held_databases);
	return false;
}

static void
wait_for_latest(void)
{
	TimestampTz deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
													   LEAVE_TIMEOUT_MS);

	/* If it has not left by then the command will say so. */
	(void) sm_shmem_wait_left(llast_oid(held_databases), deadline);
}

static void
process_utility(PlannedStmt *pstmt, const char *queryString, bool readOnlyTree,
				ProcessUtilityContext context, ParamListInfo params,
				QueryEnvironment *queryEnv, DestReceiver *dest, QueryCompletion *qc)
{
	ProcessUtility_hook_type next =
		prev_utility_hook ? prev_utility_hook : standard_ProcessUtility;
	const Node *command = pstmt->utilityStmt;
	NodeTag		tag = nodeTag(command);
	volatile bool prepared_commit = tag == T_TransactionStmt &&
		((const TransactionStmt *) command)->kind == TRANS_STMT_COMMIT_PREPARED;
	bool		held = hold_database(database_needed(command));
	bool		guarded = sm_guard_concerned(command);

	if (!held)
		next(pstmt, queryString, readOnlyTree, context, params, queryEnv, dest, qc);
	else
	{
		PG_TRY();
		{
			wait_for_latest();
			next(pstmt, queryString, readOnlyTree, context, params, queryEnv, dest, qc);
		}
		PG_CATCH();
		{
			release_latest();
			PG_RE_THROW();
		}
		PG_END_TRY();
	}

	/* The command may have been freed by now. */
	if (tag == T_CreatedbStmt || tag == T_AlterDatabaseStmt)
	{
		await_transaction_end();
		poke_list = true;
	}
	if (prepared_commit)
		sm_shmem_poke(MyDatabaseId);
	if (guarded)
		sm_guard_table_taken_out();
}

/* ----------
 * DROP EXTENSION
 * ----------
 */

/*
 * The worker looks whether the extension is still there when it is poked.  This
 * hook sees DROP SCHEMA CASCADE and DROP OWNED too.
 */
static void
access_object(ObjectAccessType access, Oid classId, Oid objectId, int subId, void *arg)
{
	if (prev_access_hook)
		prev_access_hook(access, classId, objectId, subId, arg);

	if (access != OAT_DROP)
		return;
	sm_guard_drop(classId, objectId, subId, ((ObjectAccessDrop *) arg)->dropflags);
	if (classId == ExtensionRelationId &&
		objectId == get_extension_oid(SM_EXTENSION_NAME, true))
	{
		await_transaction_end();
		poke_worker = true;
	}
}

/* Install the hooks; from _PG_init. */
void
sm_hooks_init(void)
{
	prev_access_hook = object_access_hook;
	object_access_hook = access_object;
	if (!process_shared_preload_libraries_in_progress)
		return;
	prev_utility_hook = ProcessUtility_hook;
	ProcessUtility_hook = process_utility;
}
