/*
 * run.c
 *		SQL-callable: have the worker run, wait for it, and see whether it is there.
 *
 * sync_run() runs in the caller's session and transaction, which must be able to
 * see what the worker commits meanwhile, and must not itself hold back events.  It
 * takes no lock while it waits.  It is SECURITY DEFINER, so that an operator
 * needs no right on the tables.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_database.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"
#include "utils/varlena.h"

#include "capture.h"
#include "guc.h"
#include "reason.h"
#include "request.h"
#include "shmem.h"

/* How long a call waits for a worker that may just be starting. */
#define READY_TIMEOUT_MS 5000

/* A name at least this close to what was typed is proposed in the hint. */
#define MAX_EDITS 3

/* The runs that one call has asked for. */
typedef struct Runs
{
	int			nbranches;
	char	  **branches;
	SmRequestClaim *claims;
	SmRequestResult *results;
	int			posted;			/* claims that were accepted */
	int			left;			/* ... and given up again, in the same order */
} Runs;

PG_FUNCTION_INFO_V1(softmobile_sync_run);
PG_FUNCTION_INFO_V1(softmobile_worker_status);

/* ----------
 * Is there a worker
 * ----------
 */

static bool
database_is_template(void)
{
	HeapTuple	tuple = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(MyDatabaseId));
	bool		result = false;

	if (HeapTupleIsValid(tuple))
	{
		result = ((Form_pg_database) GETSTRUCT(tuple))->datistemplate;
		ReleaseSysCache(tuple);
	}
	return result;
}

/* Why there is no worker, in a sentence; NULL when there is one. */
static const char *
explain_absence(const SmWorkerInfo *info)
{
	if (info->ready)
		return NULL;
	if (!sm_shmem_available())
		return "The library is not in shared_preload_libraries.";
	if (RecoveryInProgress())
		return "This server is a standby.";
	if (database_is_template())
		return "This database is a template.";
	if (!sm_shmem_launcher_running())
		return "The launcher is not running.";
	if (info->held)
		return "A command needs the database without connections.";

	switch (info->verdict)
	{
		case SM_VERDICT_DIED:
			return "The worker ended unexpectedly and will be started again; see the server log.";
		case SM_VERDICT_NO_PROCESS:
			return "All of max_worker_processes are in use.";
		case SM_VERDICT_ROLE_MISSING:
			return "The role softmobile.worker_role does not exist.";
		case SM_VERDICT_ROLE_SUPERUSER:
			return "The role softmobile.worker_role is a superuser.";
		case SM_VERDICT_ROLE_NOLOGIN:
			return "The role of the worker is not permitted to log in.";
		case SM_VERDICT_ROLE_NO_CONNECT:
			return "The role of the worker may not connect to this database.";
		default:
			return "The worker is being started.";
	}
}

/* softmobile.worker_status() -> (running, pid, started_at, detail) */
Datum
softmobile_worker_status(PG_FUNCTION_ARGS)
{
	SmWorkerInfo info;
	const char *absence;
	TupleDesc	desc;
	Datum		values[4] = {0};
	bool		nulls[4] = {false};

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");

	sm_shmem_worker_info(MyDatabaseId, &info);
	absence = explain_absence(&info);

	values[0] = BoolGetDatum(info.ready);
	values[1] = Int32GetDatum(info.pid);
	values[2] = TimestampTzGetDatum(info.started_at);
	nulls[1] = nulls[2] = !info.ready;
	if (absence != NULL)
		values[3] = CStringGetTextDatum(absence);
	else
		nulls[3] = true;
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(desc, values, nulls)));
}

/* ----------
 * Is it possible, and for which branches
 * ----------
 */

/* Refuse what cannot work; returns the deadline. */
static TimestampTz
check_call(FunctionCallInfo fcinfo)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz deadline;

	if (PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("timeout must not be null"),
				 errhint("Leave it out to wait for a minute at most.")));
	deadline = DatumGetTimestampTz(DirectFunctionCall2(timestamptz_pl_interval,
													   TimestampTzGetDatum(now),
													   PG_GETARG_DATUM(1)));
	if (deadline <= now)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("timeout must be positive"),
				 errhint("Say how long to wait for the run, such as interval '60 s'.")));

	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("cannot run a synchronisation on a standby"),
				 errhint("Call sync_run() on the primary server.")));
	if (!sm_shmem_available())
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("softmobile is not preloaded, so that no worker can run"),
				 errhint("Add softmobile to shared_preload_libraries and restart the server.")));
	if (IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
				 errmsg("sync_run() needs transaction isolation level READ COMMITTED"),
				 errdetail("The snapshot of this transaction could not see the result."),
				 errhint("Call sync_run() in a transaction of its own.")));
	if (sm_capture_in_transaction())
		ereport(ERROR,
				(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
				 errmsg("sync_run() cannot send the events of its own transaction"),
				 errdetail("The worker sees them only after they are committed."),
				 errhint("Commit first, then call sync_run() in a transaction of its own.")));
	return deadline;
}

/* The branch that was probably meant, or NULL.  Inside SPI. */
static const char *
find_nearest(const char *branch)
{
	const char *nearest = NULL;
	int			least = MAX_EDITS + 1;

	/* The measure is quadratic. */
	if (strlen(branch) > SM_BRANCH_MAX)
		return NULL;

	SPI_execute("SELECT branch_id FROM softmobile.branch ORDER BY branch_id", false, 0);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		const char *other = SPI_getvalue(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1);
		int			edits = varstr_levenshtein_less_equal(branch, strlen(branch),
														  other, strlen(other),
														  1, 1, 1, least, true);

		if (edits < least && edits < strlen(branch))
		{
			least = edits;
			nearest = other;
		}
	}
	return nearest;
}

/* Make sure that a branch can have a run.  Inside SPI. */
static void
check_branch(const char *branch)
{
	Oid			type = TEXTOID;
	Datum		arg = CStringGetTextDatum(branch);
	bool		isnull;

	SPI_execute_with_args("SELECT active FROM softmobile.branch WHERE branch_id = $1",
						  1, &type, &arg, NULL, false, 1);
	if (SPI_processed == 0)
	{
		const char *nearest = find_nearest(branch);

		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("branch \"%s\" does not exist", branch),
				 nearest ? errhint("Perhaps you meant \"%s\".", nearest) :
				 errhint("SELECT branch_id FROM softmobile.sync_overview lists the branches; register_branch() adds one.")));
	}
	if (!DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1,
									&isnull)))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("branch \"%s\" is not active", branch),
				 errhint("Its events wait until register_branch() makes it active.")));
}

/* The branches of a call, in the caller's memory context. */
static void
list_branches(const char *branch, Runs *runs)
{
	MemoryContext caller_context = CurrentMemoryContext;
	int			n = 1;

	SPI_connect();
	if (branch != NULL)
		check_branch(branch);
	else
	{
		SPI_execute("SELECT branch_id FROM softmobile.branch WHERE active ORDER BY branch_id",
					false, 0);
		n = SPI_processed;
	}

	MemoryContextSwitchTo(caller_context);
	runs->nbranches = n;
	runs->branches = palloc(sizeof(char *) * n);
	runs->claims = palloc(sizeof(SmRequestClaim) * n);
	runs->results = palloc0(sizeof(SmRequestResult) * n);
	for (int i = 0; i < n; i++)
		runs->branches[i] = branch ? pstrdup(branch) :
			SPI_getvalue(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1);
	SPI_finish();
}

/* ----------
 * Asking and waiting
 * ----------
 */

static void
fail_without_worker(void)
{
	SmWorkerInfo info;
	const char *absence;

	sm_shmem_worker_info(MyDatabaseId, &info);
	absence = explain_absence(&info);
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("no softmobile worker is running in this database"),
			 absence ? errdetail("%s", absence) : 0,
			 errhint("Try again when worker_status() says that it is running.")));
}

/* Ask for a run; false: the table is full, but for entries of our own. */
static bool
post_request(Runs *runs, const char *user, const char *reason, TimestampTz deadline)
{
	TimestampTz ready_deadline = Min(deadline,
									 TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
																 READY_TIMEOUT_MS));
	bool		poked = false;

	for (;;)
	{
		switch (sm_request_post(MyDatabaseId, runs->branches[runs->posted], user, reason,
								&runs->claims[runs->posted]))
		{
			case SM_REQUEST_ACCEPTED:
				runs->posted++;
				return true;
			case SM_REQUEST_TABLE_FULL:
				if (runs->posted > runs->left)
					return false;
				ereport(ERROR,
						(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
						 errmsg("too many synchronisation runs are requested"),
						 errhint("Try again when some of them are over.")));
				break;
			case SM_REQUEST_NO_WORKER:
				if (!poked)
					sm_shmem_poke_launcher(MyDatabaseId);
				poked = true;
				if (!sm_shmem_wait_ready(MyDatabaseId, ready_deadline))
					fail_without_worker();
		}
	}
}

/* Wait for the next run that we have asked for, and give the claim up. */
static void
await_result(Runs *runs, TimestampTz deadline)
{
	SmRequestResult *result = &runs->results[runs->left];

	sm_request_wait(&runs->claims[runs->left], deadline, result);
	sm_request_leave(&runs->claims[runs->left++], false);
	if (result->state == SM_REQUEST_LOST)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the softmobile worker ended before the run did"),
				 errdetail("No event is lost; the next run sends what this one did not."),
				 errhint("Call sync_run() again; the server log says why the worker ended.")));
}

/* The caller is cancelled or dies: withdraw what nobody else wants. */
static void
withdraw_requests(int code, Datum arg)
{
	Runs	   *runs = (Runs *) DatumGetPointer(arg);

	while (runs->left < runs->posted)
		sm_request_leave(&runs->claims[runs->left++], true);
}

/* Ask for all runs at once, as far as the table of requests allows, and wait. */
static void
run_branches(Runs *runs, TimestampTz deadline)
{
	const char *user = GetUserNameFromId(GetOuterUserId(), false);
	const char *reason = sm_reason_current(NULL);

	PG_ENSURE_ERROR_CLEANUP(withdraw_requests, PointerGetDatum(runs));
	{
		while (runs->posted < runs->nbranches)
		{
			if (!post_request(runs, user, reason ? reason : "", deadline))
				await_result(runs, deadline);
		}
		while (runs->left < runs->posted)
			await_result(runs, deadline);
	}
	PG_END_ENSURE_ERROR_CLEANUP(withdraw_requests, PointerGetDatum(runs));
}

/* ----------
 * The answer
 * ----------
 */

/*
 * Add the session row of a run.  One that the worker has not begun, or for which
 * it could write no row, has none: then tell what we know in the same form.
 */
static void
put_row(const char *branch, const SmRequestResult *result, ReturnSetInfo *rsinfo)
{
	bool		over = result->state == SM_REQUEST_DONE;
	Oid			types[] = {INT8OID, TEXTOID, TEXTOID, TEXTOID};
	Datum		args[] = {
		Int64GetDatum(result->session_id),
		CStringGetTextDatum(branch),
		CStringGetTextDatum(!over ? "running" : result->success ? "success" : "failed"),
		CStringGetTextDatum(result->error)
	};

	SPI_execute_with_args("SELECT * FROM softmobile.sync_history WHERE id = $1",
						  1, types, args, NULL, false, 1);
	if (SPI_processed == 0)
		SPI_execute_with_args("SELECT row.* FROM pg_catalog.jsonb_populate_record("
							  "NULL::softmobile.sync_history, pg_catalog.jsonb_build_object("
							  "'id', nullif($1, 0), 'branch_id', $2, 'mode', 'manual', 'status', $3, "
							  "'error_message', nullif($4, ''))) AS row",
							  4, types, args, NULL, false, 1);
	tuplestore_puttuple(rsinfo->setResult, SPI_tuptable->vals[0]);
}

/* softmobile.sync_run(branch text, timeout interval) -> SETOF sync_history */
Datum
softmobile_sync_run(PG_FUNCTION_ARGS)
{
	char	   *branch = PG_ARGISNULL(0) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(0));
	TimestampTz deadline = check_call(fcinfo);
	Runs		runs = {0};

	InitMaterializedSRF(fcinfo, 0);
	list_branches(branch, &runs);
	run_branches(&runs, deadline);

	SPI_connect();
	for (int i = 0; i < runs.nbranches; i++)
		put_row(runs.branches[i], &runs.results[i], (ReturnSetInfo *) fcinfo->resultinfo);
	SPI_finish();
	return (Datum) 0;
}
