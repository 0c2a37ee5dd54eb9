/*
 * link.c
 *		Tells everybody what the worker knows of each branch's link.
 *
 * Called by delivery.c in each pass, within sm_outbox_begin() and its commit.  A
 * row of softmobile.link_state is written only when a branch's state changes:
 * twice in an outage, however long it is and whatever is tried meanwhile.  The
 * worker is the only writer.
 *
 * The next worker takes up what its predecessor knew, so that a restart in the
 * middle of an outage does not make the outage look younger; its first request
 * shows whether that is still true.
 */
#include "postgres.h"

#include "delivery.h"
#include "outbox.h"
#include "utils/timestamp.h"

static const char *const inactive = "inactive";
static const char *const not_configured = "not configured";
static const char *const unknown = "unknown";
static const char *const up = "up";
static const char *const down = "down";

static bool resumed = false;

/* The word as state_of() gives it. */
static const char *
known_word(const char *state)
{
	const char *const words[] = {inactive, not_configured, unknown, up, down};

	for (int i = 0; i < lengthof(words); i++)
		if (strcmp(words[i], state) == 0)
			return words[i];
	return NULL;
}

static void
resume(void)
{
	ListCell   *lc;

	foreach(lc, sm_outbox_links())
	{
		SmLinkRow  *row = lfirst(lc);
		SmBranch   *branch = sm_registry_find(row->branch);
		SmEndpoint *endpoint = branch ? branch->endpoint : NULL;
		const char *word = known_word(row->state);

		if (branch == NULL || strcmp(row->url ? row->url : "", endpoint ? endpoint->url : "") != 0)
			continue;
		branch->link_word = word;
		branch->link_since = row->since;
		branch->link_endpoint = endpoint;
		if (word == up || word == down)
			sm_endpoint_resume(endpoint, word == up, row->since);
	}
	resumed = true;
}

static const char *
state_of(const SmBranch *branch)
{
	const SmEndpoint *endpoint = branch->endpoint;

	if (!branch->active)
		return inactive;
	if (endpoint == NULL)
		return not_configured;
	if (!endpoint->known && !endpoint->resumed)
		return unknown;
	return endpoint->reachable ? up : down;
}

void
sm_link_publish(void)
{
	ListCell   *lc;

	if (!resumed)
		resume();
	foreach(lc, sm_delivery_branches)
	{
		SmBranch   *branch = lfirst(lc);
		const char *word = state_of(branch);
		bool		dated = word == up || word == down;

		if (word == branch->link_word && branch->endpoint == branch->link_endpoint &&
			(!dated || branch->endpoint->since == branch->link_since))
			continue;
		branch->link_word = word;
		branch->link_endpoint = branch->endpoint;
		branch->link_since = dated ? branch->endpoint->since : GetCurrentTimestamp();
		sm_outbox_publish_link(branch->id, branch->endpoint ? branch->endpoint->url : NULL, word, branch->link_since);
	}
}
