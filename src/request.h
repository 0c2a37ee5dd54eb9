/*
 * request.h
 *		Requests for a run of a branch, from sync_run() to the worker.
 *
 * See request.c for the life of a request.
 */
#ifndef SM_REQUEST_H
#define SM_REQUEST_H

#include "datatype/timestamp.h"
#include "guc.h"
#include "storage/lwlock.h"

/* Longest error text of a run, in bytes; it is cut. */
#define SM_ERROR_MAX 500

/* A request as its caller holds it. */
typedef struct SmRequestClaim
{
	int			entry;
	uint64		number;
} SmRequestClaim;

typedef enum SmRequestAnswer
{
	SM_REQUEST_ACCEPTED,
	SM_REQUEST_NO_WORKER,
	SM_REQUEST_TABLE_FULL
} SmRequestAnswer;

typedef enum SmRequestState
{
	SM_REQUEST_WAITING,			/* the worker has not taken it yet */
	SM_REQUEST_RUNNING,			/* session_id: of the running session, or 0 */
	SM_REQUEST_DONE,			/* success, session_id and error are set */
	SM_REQUEST_LOST				/* the worker ended before the run did */
} SmRequestState;

typedef struct SmRequestResult
{
	SmRequestState state;
	bool		success;
	int64		session_id;		/* 0: there is no session row */
	char		error[SM_ERROR_MAX + 1];
} SmRequestResult;

/* A request as the worker takes it. */
typedef struct SmRequestTicket
{
	int			entry;
	uint64		number;
	char		branch[SM_BRANCH_MAX + 1];
	char		user[NAMEDATALEN];	/* who asked first */
	char		reason[SM_REASON_MAX + 1];	/* '': none given */
} SmRequestTicket;

/* Creation, and the end of a worker: shmem.c. */
extern Size sm_request_shmem_size(void);
extern void sm_request_shmem_startup(LWLock *request_lock);
extern void sm_request_lose_all(Oid dbid);

/* Callers.  Every accepted claim must be given up by sm_request_leave(). */
extern SmRequestAnswer sm_request_post(Oid dbid, const char *branch, const char *user,
									   const char *reason, SmRequestClaim *claim);
extern void sm_request_wait(const SmRequestClaim *claim, TimestampTz deadline,
							SmRequestResult *result);
extern void sm_request_leave(const SmRequestClaim *claim, bool withdraw);

/* The worker of the database; look for requests whenever woken. */
extern bool sm_request_take(Oid dbid, SmRequestTicket *ticket);
extern void sm_request_running(const SmRequestTicket *ticket, int64 session_id);
extern void sm_request_done(const SmRequestTicket *ticket, int64 session_id,
							bool success, const char *error);

#endif							/* SM_REQUEST_H */
