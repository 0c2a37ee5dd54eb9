/*
 * request.c
 *		Requests for a run of a branch, in shared memory: sync_run() posts them and
 *		waits, the worker takes and ends them.
 *
 * In the manner of RequestCheckpoint().  An entry belongs to a branch of a
 * database while anybody needs it.  Its runs are numbered, and
 *
 *		requested >= taken >= over >= done
 *
 * A caller who finds a request that is not taken yet shares it; else he makes the
 * next one, so that his run begins after his call.  His claim is the number.  It
 * is settled when done reaches it, and lost when only over does: the worker ended.
 * A caller who is cancelled or dies gives up his claim, and with the last claim a
 * request that is not taken yet is taken back.
 *
 * Locking protocol.  One LWLock guards every field; each condition variable guards
 * itself and is broadcast after the lock is released.  The lock of shmem.c may be
 * taken while this one is held: a request is accepted only while the worker is
 * ready, and a worker that ends becomes unready before it loses the requests, so
 * that none is accepted and then forgotten.
 */
#include "postgres.h"

#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "storage/condition_variable.h"
#include "storage/shmem.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "compat.h"
#include "request.h"
#include "shmem.h"

/* Branches, of all databases, that can have a run requested at one time. */
#define MAX_REQUESTS 64

typedef struct SmRequest
{
	Oid			dbid;			/* InvalidOid: the entry is free */
	char		branch[SM_BRANCH_MAX + 1];
	int			claims;			/* not given up yet; the entry stays while > 0 */
	uint64		requested;		/* number of the latest request */
	uint64		taken;			/* ... the latest that the worker took */
	uint64		over;			/* ... the latest that ended or was lost */
	uint64		done;			/* ... the latest that ended */
	char		user[NAMEDATALEN];	/* first caller of the latest request */
	char		reason[SM_REASON_MAX + 1];	/* that caller's reason */
	int64		running_session;	/* session of the run that is taken, or 0 */
	bool		success;		/* this and the next two: of the latest run done */
	int64		session_id;
	char		error[SM_ERROR_MAX + 1];
	ConditionVariable cv;		/* some of taken, over, done have grown */
} SmRequest;

static SmRequest *requests = NULL;
static LWLock *lock = NULL;

/* ----------
 * Creation
 * ----------
 */

Size
sm_request_shmem_size(void)
{
	return mul_size(MAX_REQUESTS, sizeof(SmRequest));
}

/* Create or find the table; called with AddinShmemInitLock held. */
void
sm_request_shmem_startup(LWLock *request_lock)
{
	bool		found;

	lock = request_lock;
	requests = ShmemInitStruct("softmobile requests", sm_request_shmem_size(), &found);
	if (found)
		return;
	memset(requests, 0, sm_request_shmem_size());
	for (int i = 0; i < MAX_REQUESTS; i++)
		ConditionVariableInit(&requests[i].cv);
}

/* ----------
 * Helpers
 * ----------
 */

/* Free an entry that nobody needs.  Call with the lock held. */
static void
free_if_idle(SmRequest *request)
{
	if (request->claims == 0 && request->requested == request->over)
		request->dbid = InvalidOid;
}

/* The entry of a branch, a free one made its own, or NULL.  Lock held. */
static SmRequest *
assign_entry(Oid dbid, const char *branch)
{
	SmRequest  *unused = NULL;

	for (int i = 0; i < MAX_REQUESTS; i++)
	{
		SmRequest  *request = &requests[i];

		if (request->dbid == dbid && strcmp(request->branch, branch) == 0)
			return request;
		if (request->dbid == InvalidOid && unused == NULL)
			unused = request;
	}

	if (unused != NULL)
	{
		unused->dbid = dbid;
		strlcpy(unused->branch, branch, sizeof(unused->branch));
		unused->claims = 0;
		unused->requested = unused->taken = unused->over = unused->done = 0;
	}
	return unused;
}

/* Copy a text, cut between characters so that it fits. */
static void
copy_clipped(char *to, const char *from, int maxlen)
{
	int			len = pg_mbcliplen(from, strlen(from), maxlen);

	memcpy(to, from, len);
	to[len] = '\0';
}

/* ----------
 * Callers
 * ----------
 */

/*
 * Ask the worker for a run of a branch that begins after this call.  A request
 * that is shared keeps the user and the reason of who came first.
 */
SmRequestAnswer
sm_request_post(Oid dbid, const char *branch, const char *user, const char *reason,
				SmRequestClaim *claim)
{
	SmRequestAnswer answer = SM_REQUEST_ACCEPTED;
	SmWorkerInfo info;
	SmRequest  *request;

	Assert(strlen(branch) <= SM_BRANCH_MAX);
	if (requests == NULL)
		return SM_REQUEST_NO_WORKER;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	sm_shmem_worker_info(dbid, &info);
	if (!info.ready)
		answer = SM_REQUEST_NO_WORKER;
	else if ((request = assign_entry(dbid, branch)) == NULL)
		answer = SM_REQUEST_TABLE_FULL;
	else
	{
		if (request->requested == request->taken)
		{
			request->requested++;
			copy_clipped(request->user, user, NAMEDATALEN - 1);
			copy_clipped(request->reason, reason, SM_REASON_MAX);
		}
		request->claims++;
		claim->entry = request - requests;
		claim->number = request->requested;
	}
	LWLockRelease(lock);

	if (answer == SM_REQUEST_ACCEPTED)
		sm_shmem_poke(dbid);
	return answer;
}

static void
read_result(const SmRequestClaim *claim, SmRequestResult *result)
{
	const SmRequest *request = &requests[claim->entry];

	memset(result, 0, sizeof(*result));
	LWLockAcquire(lock, LW_SHARED);
	if (request->done >= claim->number)
	{
		result->state = SM_REQUEST_DONE;
		result->success = request->success;
		result->session_id = request->session_id;
		strlcpy(result->error, request->error, sizeof(result->error));
	}
	else if (request->over >= claim->number)
		result->state = SM_REQUEST_LOST;
	else if (request->taken >= claim->number)
	{
		result->state = SM_REQUEST_RUNNING;
		result->session_id = request->running_session;
	}
	else
		result->state = SM_REQUEST_WAITING;
	LWLockRelease(lock);
}

/* Wait for the end of a run; at the deadline, result says how far it is. */
void
sm_request_wait(const SmRequestClaim *claim, TimestampTz deadline,
				SmRequestResult *result)
{
	static uint32 wait_event = 0;
	ConditionVariable *cv = &requests[claim->entry].cv;

	if (wait_event == 0)
		wait_event = WaitEventExtensionNew("SoftmobileRun");

	ConditionVariablePrepareToSleep(cv);
	for (;;)
	{
		long		timeout;

		read_result(claim, result);
		timeout = sm_shmem_time_left(deadline);
		if (result->state == SM_REQUEST_DONE || result->state == SM_REQUEST_LOST ||
			timeout <= 0)
			break;
		(void) ConditionVariableTimedSleep(cv, timeout, wait_event);
	}
	ConditionVariableCancelSleep();
}

/*
 * Give up a claim.  With withdraw, a request that is nobody else's and not taken
 * yet is taken back; without, the run goes on.  Safe in error and exit paths.
 */
void
sm_request_leave(const SmRequestClaim *claim, bool withdraw)
{
	SmRequest  *request = &requests[claim->entry];

	LWLockAcquire(lock, LW_EXCLUSIVE);
	Assert(request->claims > 0);
	request->claims--;
	if (withdraw && request->claims == 0)
		request->requested = request->taken;
	free_if_idle(request);
	LWLockRelease(lock);
}

/* ----------
 * The worker
 * ----------
 */

/*
 * Take the next request of a database, if there is one.  While a run of a branch
 * is on, later requests for it stay: they want one that begins after them.
 */
bool
sm_request_take(Oid dbid, SmRequestTicket *ticket)
{
	bool		taken = false;

	LWLockAcquire(lock, LW_EXCLUSIVE);
	for (int i = 0; i < MAX_REQUESTS && !taken; i++)
	{
		SmRequest  *request = &requests[i];

		if (request->dbid != dbid || request->requested == request->taken ||
			request->taken > request->over)
			continue;
		request->taken = request->requested;
		request->running_session = 0;
		ticket->entry = i;
		ticket->number = request->taken;
		strlcpy(ticket->branch, request->branch, sizeof(ticket->branch));
		strlcpy(ticket->user, request->user, sizeof(ticket->user));
		strlcpy(ticket->reason, request->reason, sizeof(ticket->reason));
		taken = true;
	}
	LWLockRelease(lock);
	return taken;
}

/* Publish the session of a run, once its row is committed. */
void
sm_request_running(const SmRequestTicket *ticket, int64 session_id)
{
	SmRequest  *request = &requests[ticket->entry];

	LWLockAcquire(lock, LW_EXCLUSIVE);
	Assert(request->taken == ticket->number && request->over < ticket->number);
	request->running_session = session_id;
	LWLockRelease(lock);
}

/*
 * Report the end of a run, once its session row is committed.  Without such a row
 * session_id is 0, and error is all that the callers get.
 */
void
sm_request_done(const SmRequestTicket *ticket, int64 session_id, bool success,
				const char *error)
{
	SmRequest  *request = &requests[ticket->entry];

	LWLockAcquire(lock, LW_EXCLUSIVE);
	Assert(request->taken == ticket->number && request->over < ticket->number);
	request->done = request->over = ticket->number;
	request->success = success;
	request->session_id = session_id;
	copy_clipped(request->error, error ? error : "", SM_ERROR_MAX);
	free_if_idle(request);
	LWLockRelease(lock);

	ConditionVariableBroadcast(&request->cv);
}

/* The worker of a database has ended: so have its runs, taken or not. */
void
sm_request_lose_all(Oid dbid)
{
	bool		lost[MAX_REQUESTS] = {false};

	LWLockAcquire(lock, LW_EXCLUSIVE);
	for (int i = 0; i < MAX_REQUESTS; i++)
	{
		SmRequest  *request = &requests[i];

		if (request->dbid != dbid)
			continue;
		lost[i] = request->over < request->requested;
		request->taken = request->over = request->requested;
		free_if_idle(request);
	}
	LWLockRelease(lock);

	for (int i = 0; i < MAX_REQUESTS; i++)
	{
		if (lost[i])
			ConditionVariableBroadcast(&requests[i].cv);
	}
}
