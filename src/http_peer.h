/*
 * http_peer.h
 *		Which addresses may be spoken to: see http_peer.c.
 */
#ifndef SM_HTTP_PEER_H
#define SM_HTTP_PEER_H

#include <curl/curl.h>

#include "http_outcome.h"

/* A list as of sm_networks_parse(), kept in the context; NULL or '': every address. */
extern void sm_http_peer_configure(const char *networks, MemoryContext context);

extern CURLcode sm_http_peer_set_options(CURL *easy, SmHttpSeen *seen);

#endif							/* SM_HTTP_PEER_H */
