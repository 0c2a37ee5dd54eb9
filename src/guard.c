/*
 * guard.c
 *		Refuses to drop the extension while events are undelivered.
 *
 * Called by the hooks in hooks.c, in the transaction of the command, before
 * anything of the extension is gone.
 *
 * DROP EXTENSION, DROP SCHEMA ... CASCADE, DROP OWNED and DROP EXTENSION plpgsql
 * CASCADE have one thing in common: they delete the extension's members, last
 * the extension itself.  A member is never deleted in another way, but by an
 * update script of the extension, so its first member is where to look: the log
 * is still readable then.  All that is deleted has been locked exclusively
 * before, hence nobody's sale can come in between, and the latest snapshot shows
 * all that was committed while the command waited for its locks.
 *
 * Without preload a server has no hooks until something loads the library; the
 * event trigger that calls load_guard() does, before each command that can drop
 * an extension.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/dependency.h"
#include "catalog/pg_extension.h"
#include "commands/extension.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "guard.h"
#include "guc.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "process.h"
#include "utils/snapmgr.h"

PG_FUNCTION_INFO_V1(softmobile_load_guard);

/* The extension whose members are being deleted, after it was found free to go. */
static Oid	passed = InvalidOid;

static void
at_transaction_end(XactEvent event, void *arg)
{
	passed = InvalidOid;
}

static void
at_subtransaction_end(SubXactEvent event, SubTransactionId mySubid,
					  SubTransactionId parentSubid, void *arg)
{
	if (event == SUBXACT_EVENT_ABORT_SUB)
		passed = InvalidOid;
}

/*
 * softmobile.load_guard() -> void: whoever calls it has the library, and with it
 * the hooks.
 */
Datum
softmobile_load_guard(PG_FUNCTION_ARGS)
{
	PG_RETURN_VOID();
}

/*
 * What is undelivered, in words; NULL: nothing.  As the extension's owner: the
 * owner of its schema may drop it without having any right in it.  With the
 * caller's search_path, so the query has no operators.
 */
static char *
undelivered(Oid owner)
{
	Oid			user;
	int			context;
	char	   *words = NULL;

	GetUserIdAndSecContext(&user, &context);
	SetUserIdAndSecContext(owner, context | SECURITY_LOCAL_USERID_CHANGE);
	SPI_connect();
	PushActiveSnapshot(GetLatestSnapshot());
	if (SPI_execute("SELECT words FROM softmobile.undelivered()", true, 1) != SPI_OK_SELECT || SPI_processed != 1)
		elog(ERROR, "could not look for undelivered events");
	words = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
	if (words != NULL)
		words = strcpy(SPI_palloc(strlen(words) + 1), words);
	PopActiveSnapshot();
	SPI_finish();
	SetUserIdAndSecContext(user, context);
	return words;
}

/* An ERROR that begins with what was tried, if events are undelivered. */
static void
refuse_undelivered(Oid owner, const char *tried)
{
	char	   *words;

	if (sm_drop_undelivered)
		return;
	words = undelivered(owner);
	if (words == NULL)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_IN_USE),
			 errmsg("cannot %s while %s", tried, words),
			 errdetail("Headquarters would never learn of them."),
			 errhint("Send them first: call softmobile.sync_run(). To lose them: SET softmobile.drop_undelivered = on (superusers only).")));
}

void
sm_guard_drop(Oid classId, Oid objectId, int subId, int flags)
{
	Oid			extension;
	Oid			owner = InvalidOid;

	/* Deletions with these flags never take an extension along. */
	if (subId != 0 || IsBinaryUpgrade ||
		(flags & (PERFORM_DELETION_INTERNAL | PERFORM_DELETION_SKIP_EXTENSIONS)) != 0)
		return;

	extension = classId == ExtensionRelationId ? objectId : getExtensionOfObject(classId, objectId);
	if (!OidIsValid(extension) || extension != sm_process_lookup_extension(&owner) ||
		(creating_extension && CurrentExtensionObject == extension))
		return;

	if (passed != extension)
		refuse_undelivered(owner, "drop extension \"" SM_EXTENSION_NAME "\"");
	/* The extension goes last. */
	passed = classId == ExtensionRelationId ? InvalidOid : extension;
}

bool
sm_guard_concerned(const Node *command)
{
	const AlterExtensionContentsStmt *stmt = (const AlterExtensionContentsStmt *) command;

	return IsA(command, AlterExtensionContentsStmt) && stmt->action < 0 &&
		stmt->objtype == OBJECT_TABLE && strcmp(stmt->extname, SM_EXTENSION_NAME) == 0 &&
		!creating_extension;
}

void
sm_guard_table_taken_out(void)
{
	Oid			owner;

	if (OidIsValid(sm_process_lookup_extension(&owner)))
		refuse_undelivered(owner, "take a table out of extension \"" SM_EXTENSION_NAME "\"");
}

void
sm_guard_init(void)
{
	RegisterXactCallback(at_transaction_end, NULL);
	RegisterSubXactCallback(at_subtransaction_end, NULL);
}
