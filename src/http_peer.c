/*
 * http_peer.c
 *		Which addresses may be spoken to (softmobile.central_networks).
 *
 * Called by http.c alone.  The name of the central server is looked up by whoever answers
 * for DNS at the branch; a lying or poisoned answer must not lead the token and the events
 * elsewhere, nor to a service within the branch's own network.  So each address is looked at
 * before libcurl connects to it, and once more before anything is sent, because a connection
 * that is kept may be older than the setting.  The callbacks neither allocate nor throw.
 */
#include "postgres.h"

#include <curl/curl.h>
#include <unistd.h>

#include "http_peer.h"
#include "networks.h"
#include "utils/memutils.h"

static SmNetworks *allowed = NULL;	/* NULL: every address */

void
sm_http_peer_configure(const char *networks, MemoryContext context)
{
	MemoryContext caller = MemoryContextSwitchTo(context);
	const char *problem;

	allowed = NULL;
	problem = sm_networks_parse(networks ? networks : "", &allowed);
	if (problem != NULL)
		elog(ERROR, "unexpected list of networks: %s", problem);
	MemoryContextSwitchTo(caller);
}

static curl_socket_t
open_socket(void *arg, curlsocktype purpose, struct curl_sockaddr *address)
{
	SmHttpSeen *seen = arg;

	if (allowed != NULL && !sm_networks_hold(allowed, &address->addr))
	{
		seen->peers_refused++;
		return CURL_SOCKET_BAD;
	}
	seen->peers_allowed++;
	return socket(address->family, address->socktype | SOCK_CLOEXEC, address->protocol);
}

static int
before_request(void *arg, char *peer, char *self, int peer_port, int self_port)
{
	SmHttpSeen *seen = arg;

	if (allowed == NULL || sm_networks_hold_text(allowed, peer))
		return CURL_PREREQFUNC_OK;
	seen->peers_refused++;
	seen->peers_allowed = 0;
	return CURL_PREREQFUNC_ABORT;
}

CURLcode
sm_http_peer_set_options(CURL *easy, SmHttpSeen *seen)
{
	CURLcode	rc = curl_easy_setopt(easy, CURLOPT_OPENSOCKETFUNCTION, open_socket);

	if (rc == CURLE_OK)
		rc = curl_easy_setopt(easy, CURLOPT_OPENSOCKETDATA, seen);
	if (rc == CURLE_OK)
		rc = curl_easy_setopt(easy, CURLOPT_PREREQFUNCTION, before_request);
	if (rc == CURLE_OK)
		rc = curl_easy_setopt(easy, CURLOPT_PREREQDATA, seen);
	return rc;
}
