/*
 * session.c
 *		Sessions of a branch, and those who wait for one to end.
 *
 * A session runs from the first batch to the empty queue or the first failure.
 * Called by delivery.c, requeue.c and answer.c between sm_outbox_begin() and
 * sm_session_commit(), which commits and then tells the callers of sync_run().
 */
#include "postgres.h"

#include "delivery.h"
#include "outbox.h"
#include "request.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#define AUTOMATIC_REASON	"Sincronización automática"

void
sm_session_open(SmBranch *branch, bool manual, const char *user, const char *reason)
{
	branch->session = sm_outbox_open_session(branch->id, manual, user, reason);
	branch->manual = manual;
	branch->session_started = GetCurrentTimestamp();
	branch->line.ceiling = 0;	/* found out anew in each session */
	branch->session_reason = MemoryContextStrdup(sm_delivery_cxt,
												 reason && reason[0] ? reason : AUTOMATIC_REASON);
}

/*
 * Ends the branch's session, if it has one, and tells those who wait for it.
 * Within a transaction; the callers are told after its commit.
 */
static List *finished = NIL;	/* of Finished */

typedef struct Finished
{
	SmRequestTicket *ticket;
	int64		session;
	char	   *error;
} Finished;

void
sm_session_finish(SmRequestTicket *ticket, int64 session, const char *error)
{
	MemoryContext caller = MemoryContextSwitchTo(sm_delivery_cxt);
	Finished   *done = palloc0(sizeof(Finished));

	done->ticket = ticket;
	done->session = session;
	done->error = error ? pstrdup(error) : NULL;
	finished = lappend(finished, done);
	MemoryContextSwitchTo(caller);
}

void
sm_session_end(SmBranch *branch, const char *error)
{
	ListCell   *lc;

	if (branch->session == 0)
		return;
	sm_outbox_close_session(branch->session, error);
	foreach(lc, branch->tickets)
		sm_session_finish(lfirst(lc), branch->session, error);
	list_free(branch->tickets);
	branch->tickets = NIL;
	branch->session = 0;
	branch->manual = false;
	branch->checked = false;
	pfree(branch->session_reason);
	branch->session_reason = NULL;
	if (branch->session_error)
		pfree(branch->session_error);
	branch->session_error = NULL;
}

/* Commits; runs that are over are made durable before their callers are told. */
void
sm_session_commit(void)
{
	ListCell   *lc;

	if (finished == NIL)
	{
		sm_outbox_commit();
		return;
	}
	sm_outbox_commit_durably();
	foreach(lc, finished)
	{
		Finished   *done = lfirst(lc);

		sm_request_done(done->ticket, done->session, done->error == NULL, done->error ? done->error : "");
		pfree(done->ticket);
		if (done->error)
			pfree(done->error);
	}
	list_free_deep(finished);
	finished = NIL;
}
