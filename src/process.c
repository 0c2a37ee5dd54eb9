/*
 * process.c
 *		First and last steps of the processes that the launcher starts in a
 *		database: the probe, and the beginning of the worker.
 *
 * Whether a database has the extension, and who owns it, can only be seen from
 * inside; yet a process must choose its role before it connects.  So each start of
 * a worker begins with a probe: a process of a few milliseconds that connects as
 * the bootstrap superuser, reads pg_extension and pg_authid, leaves its verdict in
 * shared memory and ends.  The worker then connects as the role that the probe
 * found, softmobile.worker_role or the extension's owner, and never was, nor can
 * become, anybody else.  The probe also notes the settings of the database and the
 * role: a session reads them once, when it connects, and later ones must not be
 * taken for those.
 *
 * The probe runs none of the database's code.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/stratnum.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/indexing.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_database.h"
#include "catalog/pg_db_role_setting.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_type.h"
#include "commands/dbcommands.h"
#include "commands/extension.h"
#include "common/hashfn.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "tcop/tcopprot.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/rel.h"
#include "utils/syscache.h"

#include "compat.h"
#include "guc.h"
#include "process.h"

/* What the probe found; the settings that this worker connected with. */
static SmProbed probed = {0};

/* Every message of the process says which database it is about. */
static void
add_context(void *arg)
{
	errcontext("%s", MyBgworkerEntry->bgw_name);
}

/* Install signal handlers, take over the slot; ends the process if it is void. */
static Oid
attach_process(Datum main_arg)
{
	static ErrorContextCallback context = {.callback = add_context};
	uint32		generation;
	Oid			dbid;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();

	context.previous = error_context_stack;
	error_context_stack = &context;

	memcpy(&generation, MyBgworkerEntry->bgw_extra, sizeof(generation));
	if (!sm_shmem_worker_attach(DatumGetInt32(main_arg), generation, &dbid, &probed))
		proc_exit(0);
	return dbid;
}

Oid
sm_process_lookup_extension(Oid *owner)
{
	Oid			extension = InvalidOid;
	Relation	rel;
	SysScanDesc scan;
	ScanKeyData key;
	HeapTuple	tuple;

	rel = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber, F_NAMEEQ,
				CStringGetDatum(SM_EXTENSION_NAME));
	scan = systable_beginscan(rel, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		Form_pg_extension form = (Form_pg_extension) GETSTRUCT(tuple);

		extension = form->oid;
		*owner = form->extowner;
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return extension;
}

/* Changes with the settings of ours that a session of the role begins with here. */
static uint64
digest_settings(Oid role)
{
	uint64		digest = 0;
	Relation	rel;
	SysScanDesc scan;
	HeapTuple	tuple;

	/* Through the index: always in the same order. */
	rel = table_open(DbRoleSettingRelationId, AccessShareLock);
	scan = systable_beginscan(rel, DbRoleSettingDatidRolidIndexId, true, NULL, 0, NULL);
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Form_pg_db_role_setting form = (Form_pg_db_role_setting) GETSTRUCT(tuple);
		Oid			whose[2] = {form->setdatabase, form->setrole};
		bool		is_null;
		Datum		config;
		Datum	   *settings;
		int			n;

		if ((OidIsValid(whose[0]) && whose[0] != MyDatabaseId) || (OidIsValid(whose[1]) && whose[1] != role))
			continue;
		config = heap_getattr(tuple, Anum_pg_db_role_setting_setconfig, RelationGetDescr(rel), &is_null);
		if (is_null)
			continue;
		deconstruct_array(DatumGetArrayTypeP(config), TEXTOID, -1, false, TYPALIGN_INT, &settings, NULL, &n);
		for (int i = 0; i < n; i++)
		{
			char	   *setting = TextDatumGetCString(settings[i]);

			if (strncmp(setting, SM_EXTENSION_NAME ".", sizeof(SM_EXTENSION_NAME)) != 0)
				continue;
			digest = hash_bytes_extended((unsigned char *) whose, sizeof(whose), digest);
			digest = hash_bytes_extended((unsigned char *) setting, strlen(setting), digest);
		}
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return digest;
}

/* Can the worker of this database run, and as whom? */
static SmVerdict
judge_role(Oid owner, Oid *role)
{
	bool		named = sm_worker_role[0] != '\0';
	HeapTuple	tuple;
	bool		can_login;

	*role = named ? get_role_oid(sm_worker_role, true) : owner;
	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(*role));
	if (!HeapTupleIsValid(tuple))
		return SM_VERDICT_ROLE_MISSING;
	can_login = ((Form_pg_authid) GETSTRUCT(tuple))->rolcanlogin;
	ReleaseSysCache(tuple);

	if (named && superuser_arg(*role))
		return SM_VERDICT_ROLE_SUPERUSER;
	if (!can_login)
		return SM_VERDICT_ROLE_NOLOGIN;
	if (object_aclcheck(DatabaseRelationId, MyDatabaseId, *role, ACL_CONNECT) !=
		ACLCHECK_OK)
		return SM_VERDICT_ROLE_NO_CONNECT;
	return SM_VERDICT_FIT;
}

/* Log why no worker can run here. */
static void
complain(SmVerdict verdict, Oid role)
{
	const char *name = OidIsValid(role) ? GetUserNameFromId(role, true) : NULL;
	const char *database = get_database_name(MyDatabaseId);

	if (name == NULL)
		name = sm_worker_role;

	ereport(LOG,
			(errmsg("no softmobile worker can run in database \"%s\"", database),
			 verdict == SM_VERDICT_ROLE_MISSING ?
			 errdetail("Role \"%s\" does not exist.", name) :
			 verdict == SM_VERDICT_ROLE_SUPERUSER ?
			 errdetail("Role \"%s\" is a superuser.", name) :
			 verdict == SM_VERDICT_ROLE_NOLOGIN ?
			 errdetail("Role \"%s\" is not permitted to log in.", name) :
			 errdetail("Role \"%s\" may not connect to the database.", name),
			 verdict == SM_VERDICT_ROLE_NO_CONNECT ?
			 errhint("GRANT CONNECT ON DATABASE \"%s\" TO \"%s\".", database, name) :
			 errhint("Set softmobile.worker_role to a role that has LOGIN and is not "
					 "a superuser.")));
}

/* Main function of a probe. */
void
softmobile_probe_main(Datum main_arg)
{
	Oid			owner;
	Oid			role = InvalidOid;
	Oid			dbid = attach_process(main_arg);
	SmVerdict	verdict = SM_VERDICT_NO_EXTENSION;
	SmVerdict	previous;

	BackgroundWorkerInitializeConnectionByOid(dbid, InvalidOid, 0);
	CHECK_FOR_INTERRUPTS();

	StartTransactionCommand();
	if (OidIsValid(sm_process_lookup_extension(&owner)))
		verdict = judge_role(owner, &role);
	probed = (SmProbed) {role, digest_settings(role)};
	previous = sm_shmem_worker_verdict(verdict, &probed);
	if (verdict != SM_VERDICT_NO_EXTENSION && verdict != SM_VERDICT_FIT &&
		verdict != previous)
		complain(verdict, role);
	CommitTransactionCommand();

	proc_exit(0);
}

/*
 * Attach the worker to its slot and its database.  The worker calls
 * sm_shmem_worker_ready() when it is able to take requests.
 */
Oid
sm_process_join(Datum main_arg)
{
	Oid			owner;
	Oid			dbid = attach_process(main_arg);
	Oid			extension;

	/* An invalid role would mean the bootstrap superuser. */
	if (!OidIsValid(probed.role))
		elog(ERROR, "softmobile worker was started without a role");
	BackgroundWorkerInitializeConnectionByOid(dbid, probed.role, 0);
	CHECK_FOR_INTERRUPTS();

	StartTransactionCommand();
	extension = sm_process_lookup_extension(&owner);
	CommitTransactionCommand();
	if (!OidIsValid(extension))
		sm_process_leave(SM_VERDICT_NO_EXTENSION);
	return extension;
}

bool
sm_process_settings_changed(void)
{
	return digest_settings(probed.role) != probed.settings;
}

bool
sm_process_extension_stands(Oid extension)
{
	LockDatabaseObject(ExtensionRelationId, extension, 0, AccessShareLock);
	return get_extension_oid(SM_EXTENSION_NAME, true) == extension;
}

void
sm_process_leave(SmVerdict verdict)
{
	(void) sm_shmem_worker_verdict(verdict, NULL);
	proc_exit(0);
}
