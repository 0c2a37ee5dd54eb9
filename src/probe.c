/*
 * probe.c
 *		Requests of the worker that carry no events: is the link up again, does it
 *		work for a sync_run() that had nothing to send, and do both sides have the
 *		same numbers.
 *
 * The comparison is due when the worker begins, when the link comes back, and once
 * in every sync_interval.  While it is due or on its way, nothing of the branch is
 * sent: a database that was set back must not use a number that central has.  A
 * central that does not offer it, or is not ours, is none the worse for it.
 *
 * Called by delivery.c, outside transactions; opens its own.
 */
#include "postgres.h"

#include "compat.h"
#include "delivery.h"
#include "guc.h"
#include "http.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "outbox.h"
#include "sign.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#define MAX_HEALTH			65536
#define MAX_NUMBERS			(16 * 1024 * 1024)

/* Comparisons on their way at once: batches need requests too. */
#define MAX_VERIFYING		8

/* When a comparison that could not be made is tried again, at the latest. */
#define VERIFY_AGAIN_MS		60000

/* How long central may wait to be told of void numbers. */
#define VOID_MS				5000

typedef enum ProbeKind
{
	PROBE_LINK,					/* of an endpoint that is down, or silent for long */
	PROBE_RUN,					/* for a sync_run() */
	PROBE_VERIFY
} ProbeKind;

typedef struct Probe
{
	ProbeKind	kind;
	SmEndpoint *endpoint;
	SmBranch   *branch;			/* NULL for PROBE_LINK */
	char	   *body;			/* PROBE_VERIFY: stays until the answer is there */
	int64		void_upto;		/* ledger row up to which body tells void numbers */
} Probe;

static List *probes = NIL;
static int	verifying = 0;

static void
forget(Probe *probe)
{
	probes = list_delete_ptr(probes, probe);
	if (probe->kind == PROBE_VERIFY)
		verifying--;
	if (probe->body)
		pfree(probe->body);
	pfree(probe);
}

/* Takes over the body; false: no further request is possible now. */
static bool
submit(ProbeKind kind, SmEndpoint *endpoint, SmBranch *branch, char *body, int64 void_upto)
{
	MemoryContext caller = MemoryContextSwitchTo(sm_delivery_cxt);
	Probe	   *probe = palloc0(sizeof(Probe));
	char	   *token;
	SmHttpRequest request = {
		.method = body ? "POST" : "GET",
		.url = psprintf("%s/%s", endpoint->url, body ? "verify" : "health"),
		.body = body,
		.body_len = body ? strlen(body) : 0,
		.content_type = body ? "application/json; charset=UTF-8" : NULL,
		.connect_timeout_ms = sm_connect_timeout,
		.request_timeout_ms = sm_request_timeout,
		.max_response = body ? MAX_NUMBERS : MAX_HEALTH,
		.tag = probe,
	};
	bool		accepted;

	*probe = (Probe) {kind, endpoint, branch, body, void_upto};
	probes = lappend(probes, probe);
	if (kind == PROBE_VERIFY)
		verifying++;
	MemoryContextSwitchTo(caller);

	(void) sm_endpoint_token(sm_auth_token_file, &token);
	request.bearer = token;
	/* what is wrong with the files, the next batch says */
	if (body != NULL)
		(void) sm_sign_request(&request, NULL);
	accepted = sm_http_submit(&request);
	pfree(unconstify(char *, request.url));
	if (!accepted)
		forget(probe);
	return accepted;
}

/* Is the link up?  For a sync_run() that has nothing to send. */
bool
sm_probe_branch(SmBranch *branch)
{
	return submit(PROBE_RUN, branch->endpoint, branch, NULL, 0);
}

static void
ask_numbers(SmBranch *branch)
{
	int64		void_upto;
	char	   *question;
	char	   *body;

	sm_delivery_begin();
	question = sm_outbox_verify_question(branch->id, branch->void_upto, &void_upto);
	body = pg_server_to_any(question, strlen(question), PG_UTF8);
	body = MemoryContextStrdup(sm_delivery_cxt, body);
	sm_outbox_commit();
	if (submit(PROBE_VERIFY, branch->endpoint, branch, body, void_upto))
		branch->verify = SM_VERIFY_ASKED;
}

/*
 * Whoever watches is told what is true now: a link that was found dead, but that
 * nothing has been sent on since, is looked at; so is one that no comparison
 * looks at.
 */
static bool
may_check(const SmBranch *branch, TimestampTz now)
{
	const SmEndpoint *endpoint = branch->endpoint;

	if (endpoint->down || endpoint->probing || endpoint->next_check > now)
		return false;
	if (branch->receipts && !(endpoint->known && !endpoint->reachable))
		return false;
	return branch->active && branch->in_flight == NULL && list_length(probes) < MAX_VERIFYING;
}

void
sm_probe_send_due(TimestampTz now)
{
	ListCell   *lc;

	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);
		SmEndpoint *endpoint = branch->endpoint;

		if (endpoint == NULL)
			continue;
		if (sm_endpoint_probe_due(endpoint, now) || may_check(branch, now))
			endpoint->probing = submit(PROBE_LINK, endpoint, NULL, NULL, 0);
		if (branch->verify == SM_VERIFY_DONE && branch->verify_at <= now)
			branch->verify = SM_VERIFY_DUE;
		/* A sink that sends no receipts counts nothing. */
		if (!branch->receipts)
			branch->verify = SM_VERIFY_DONE;
		else if (branch->verify == SM_VERIFY_DUE && branch->active && branch->in_flight == NULL &&
				 !endpoint->down && verifying < MAX_VERIFYING)
			ask_numbers(branch);
	}
}

/* The link was down: central may have been restored meanwhile. */
void
sm_probe_verify_again(SmEndpoint *endpoint)
{
	ListCell   *lc;

	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);

		if (branch->endpoint == endpoint && branch->verify == SM_VERIFY_DONE)
			branch->verify = SM_VERIFY_DUE;
	}
}

/*
 * Numbers have become void.  While central takes them for events that are still to
 * come, it holds that they may explain a difference, and sees no conflict.
 */
void
sm_probe_verify_soon(SmBranch *branch)
{
	TimestampTz soon = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), VOID_MS);

	if (branch->verify_at > soon)
		branch->verify_at = soon;
}

/* --- answers --- */

static void
handle_health(Probe *probe, const SmHttpResult *result)
{
	SmEndpoint *endpoint = probe->endpoint;
	bool		answered = result->outcome == SM_HTTP_ANSWERED || result->outcome == SM_HTTP_PROTOCOL;
	SmBranch   *branch = probe->branch;

	if (probe->kind == PROBE_LINK)
		endpoint->probing = false;
	sm_delivery_begin();
	if (!answered && branch == NULL && !endpoint->down)
		sm_endpoint_note(endpoint, false);	/* what there is to send is tried nevertheless */
	else if (!answered)
		sm_endpoint_failed(endpoint);
	else if (sm_endpoint_answered(endpoint))
		sm_requeue_link_back(endpoint);
	if (branch != NULL)
	{
		branch->checking = false;
		branch->checked = true;
		if (!answered && branch->session != 0)
			sm_session_end(branch, result->outcome == SM_HTTP_OFFLINE ? "offline" :
						   psprintf("%s: %s", result->outcome == SM_HTTP_TLS ? "tls" : "configuration", result->error));
		branch->force = answered;
	}
	sm_session_commit();
}

/* Says what a comparison found, when it is something else than at the last one. */
static void
report(SmBranch *branch, const SmVerification *found)
{
	if (found->missing > 0 && found->missing != branch->found.missing)
		ereport(WARNING,
				(errmsg("softmobile: central has lost " INT64_FORMAT " events of branch \"%s\" that it had acknowledged",
						found->missing, branch->id),
				 errhint("SELECT * FROM softmobile.verify_delivery(%s) names them, softmobile.resend() sends them again.",
						 quote_literal_cstr(branch->id))));
	if (found->unknown > 0 && found->unknown != branch->found.unknown)
		ereport(WARNING,
				(errmsg("softmobile: central has " INT64_FORMAT " events of branch \"%s\" that are not in this database",
						found->unknown, branch->id),
				 errdetail("This database was restored or set back to an earlier state."),
				 errhint("They are safe at headquarters; SELECT * FROM softmobile.verify_delivery(%s) names their numbers.",
						 quote_literal_cstr(branch->id))));
	if (found->forks > 0 && found->forks != branch->found.forks)
		ereport(WARNING,
				(errmsg("softmobile: central received " INT64_FORMAT " numbers of branch \"%s\" with two events",
						found->forks, branch->id),
				 errdetail("Another server sends as this branch, or this database was set back without noticing. Central keeps both events of each."),
				 errhint("Make sure that one server alone has softmobile.central_url set for this branch.")));
	branch->found = *found;
}

static void
handle_numbers(Probe *probe, const SmHttpResult *result)
{
	SmBranch   *branch = probe->branch;
	SmVerification found = {0};
	bool		understood;

	branch->verify = SM_VERIFY_DONE;
	branch->verify_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), sm_sync_interval * INT64CONST(1000));
	if (result->status != 404 && result->status != 405)
		branch->verify_at = Min(branch->verify_at, TimestampTzPlusMilliseconds(GetCurrentTimestamp(), VERIFY_AGAIN_MS));
	if (!probe->endpoint->down)
		sm_endpoint_note(probe->endpoint, result->outcome == SM_HTTP_ANSWERED || result->outcome == SM_HTTP_PROTOCOL);
	/* What is wrong, the next batch will tell; without a batch it can wait. */
	if (result->outcome != SM_HTTP_ANSWERED || result->status != 200 ||
		strlen(result->body) != result->body_len ||
		!pg_verify_mbstr(PG_UTF8, result->body, result->body_len, true))
		return;

	sm_delivery_begin();
	understood = sm_outbox_take_verification(branch->id, pg_any_to_server(result->body, result->body_len, PG_UTF8), &found);
	if (understood && found.why != NULL)
	{
		sm_outbox_open_epoch(found.why);
		ereport(LOG,
				(errmsg("softmobile: opened a new epoch: %s", found.why),
				 errdetail("This database was set back to an earlier state.")));
	}
	if (found.why != NULL)
		sm_outbox_commit_durably();
	else
		sm_outbox_commit();
	if (!understood)
		return;
	found.why = NULL;
	report(branch, &found);
	/*
	 * What was sold between the server's start and the first comparison may have
	 * used numbers for the second time; soon after it was sent, that shows.
	 */
	if (branch->void_upto > 0)
		branch->verify_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), sm_sync_interval * INT64CONST(1000));
	branch->void_upto = Max(probe->void_upto, 1);
}

/* True: the result was of a probe. */
bool
sm_probe_handle(const SmHttpResult *result)
{
	Probe	   *probe = result->tag;

	if (!list_member_ptr(probes, probe))
		return false;
	if (probe->kind == PROBE_VERIFY)
		handle_numbers(probe, result);
	else
		handle_health(probe, result);
	forget(probe);
	return true;
}
